"""Who owns the memory in which one prompt's keys and values are put together.

The engine owns its own (`EngineMemory`). Something else can own it just as well: a server's worker, say, that keeps keys and values
in pages and copies each finished layer there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.cache_utils import Cache

from cachetune_rag.model import KVBuffers, ModelAdapter
from cachetune_rag.reuse.prefix_cache import KeptRows, PrefixCache

Ids = NDArray[np.int64]


class KVMemory(Protocol):
    """The owner of the rows that a prompt's keys and values are put together in. It is called under the model's lock."""

    def take(self, ids: Ids, exact: int, answer_tokens: int) -> tuple[KVBuffers, int]:
        """Give buffers for a prompt.

        It may be called again for the same prompt, when the prompt starts over because a chunk could not be read. The buffers that
        were given before are not used any more then. They are not used either if all of the prompt turns out to be computed.

        Args:
            ids: the prompt's token ids.
            exact: tokens before the first reused chunk; their rows are the same as after a full prefill.
            answer_tokens: tokens that an answer behind the prompt is expected to have; the buffers should have rows for them.

        Returns:
            The buffers, and how many of the first `exact` tokens already have their rows in them. Those tokens are not computed.
        """

    def layer_ready(self, buffers: KVBuffers, layer: int) -> None:
        """All rows of a layer are final, in the order of the current CUDA stream (on a CPU: now).

        The owner may start copying them elsewhere while the next layer computes. Nothing reads or writes the layer's part of the buffers from then on, so the owner may also give that
        memory to the next prompt, unless it needs the rows itself in `keep`.
        """

    def keep(self, ids: Ids, exact: int, buffers: KVBuffers | None, cache: Cache) -> None:
        """A prompt was read.

        Args:
            ids: the prompt's token ids.
            exact: how many of its first tokens have exact rows; all of them if the prompt was computed whole.
            buffers: those that `take` gave; None if they were not needed, because all of the prompt was computed.
            cache: the keys and values of the whole prompt.
        """

    def beginning(self, ids: Ids) -> KeptRows | None:
        """Exact rows of a prompt's first tokens, all but the last one at most; asked for prompts without any stored chunk."""

    def forget(self) -> None:
        """The model's weights were changed: rows that were kept must not be given any more."""


class EngineMemory:
    """The engine's own `KVMemory`: new buffers for each prompt, and the beginnings of recent prompts kept in a `PrefixCache`."""

    def __init__(self, adapter: ModelAdapter):
        self._adapter = adapter
        self._prefixes = PrefixCache()

    def take(
        self,
        ids: Ids,
        exact: int,
        answer_tokens: int,
        memory: Tensor | None = None,
        await_layer: Callable[[int], None] | None = None,
    ) -> tuple[KVBuffers, int]:
        """See `KVMemory`.

        Args:
            ids, exact, answer_tokens: see `KVMemory`.
            memory: where the buffers are, uint8 of `bytes_for(ids, answer_tokens)` bytes; None: in memory of their own.
            await_layer: see `KVBuffers`.
        """
        buffers = self._adapter.new_buffers(len(ids), answer_tokens, memory, await_layer)
        beginning = self._prefixes.find(ids, exact, self._short(ids))
        if beginning is None:
            return buffers, 0
        if buffers.device.type == "cuda":  # perhaps not the stream that it was made on
            beginning.buffers.used_on(torch.cuda.current_stream(buffers.device))
        buffers.fill_first(beginning.count, beginning.buffers)
        return buffers, beginning.count

    def bytes_for(self, ids: Ids, answer_tokens: int) -> int:
        """Bytes of the buffers that `take` gives."""
        return self._adapter.buffer_bytes(len(ids), answer_tokens)

    def layer_bytes(self, ids: Ids, answer_tokens: int) -> list[int]:
        """The same, layer by layer, as they lie in the memory of such buffers."""
        return self._adapter.layer_bytes(len(ids), answer_tokens)

    def layer_ready(self, buffers: KVBuffers, layer: int) -> None:
        """See `KVMemory`. Nothing to do: the prompt's cache shows these buffers."""

    def keep(self, ids: Ids, exact: int, buffers: KVBuffers | None, cache: Cache) -> None:
        """See `KVMemory`."""
        if buffers is not None:
            row_bytes, copy = buffers.row_bytes, buffers.copy_first
        else:
            row_bytes, copy = self._adapter.row_bytes, partial(self._adapter.rows_of_cache, cache)
        self._prefixes.keep(ids[:exact], row_bytes, copy, self._short(ids))

    def beginning(self, ids: Ids) -> KeptRows | None:
        """See `KVMemory`."""
        return self._prefixes.find(ids, len(ids) - 1, self._short(ids))

    def forget(self) -> None:
        """See `KVMemory`."""
        self._prefixes = PrefixCache()

    def _short(self, ids: Ids) -> bool:
        """Whether a long-rope model computes the prompt with its factors for short prompts, so that its rows suit no long prompt."""
        return len(ids) <= self._adapter.reuse_beyond
