"""Decoding steps: the model on one token after another, behind a prompt's keys and values."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from cachetune_rag.model.cuda.device_forward import DeviceForward
from cachetune_rag.model.plain.buffers import KVBuffers

ANSWER_ROWS = 1024
"""How many rows for an answer's tokens are made at a time. An answer may end long before its limit."""


class KernelSteps:
    """Decoding steps through the kernels. Each writes its token's keys and values into the row behind the last one.

    A step of transformers launches about a thousand kernels from Python, and copies all keys and values of every layer to append one
    row. Here one captured graph serves every step of every answer.

    Args:
        forward: the model's forwards.
        find: gives the prompt's keys and values; called at the first step.
        cache: shows the prompt's rows, and no others, to everything else.
    """

    def __init__(self, forward: DeviceForward, find: Callable[[], KVBuffers], cache: Cache):
        self._forward, self._find, self._cache = forward, find, cache
        self._buffers: KVBuffers | None = None
        self._taken = 0

    @torch.no_grad()
    def __call__(self, token: int) -> Tensor:
        """The logits behind one more token, [1, vocab]."""
        buffers = self._buffers = self._buffers or self._find()
        if self._taken == buffers.answer_rows:
            buffers.grow(ANSWER_ROWS)
            buffers.show_in(self._cache)  # otherwise it would keep the old memory
        # Kernels run on torch's current device.
        with torch.cuda.device(buffers.device) if buffers.device.type == "cuda" else nullcontext():
            logits = self._forward.step(token, buffers.length + self._taken, buffers)
        self._taken += 1
        return logits
