"""Attention of the selected tokens over the whole buffer.

A mask by true position hides from every selected token the keys behind it, but torch's attention would still compute with them. The
tokens are in ascending order, so a block of them needs no key behind its last token. Computing block by block halves the work. The
function is registered with transformers' `AttentionInterface`, its public way to add an attention function, and replaces "sdpa"
during a selective forward. At other times it does the same as transformers' sdpa.

On a CUDA device the kernels of `cachetune_rag.kernels` replace it. They need no mask, and read grouped heads without copying them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from cachetune_rag.model.plain.watch import Watch

_T = TypeVar("_T")
NAME = "cachetune_sdpa"
BLOCK = 48
"""How many selected tokens are computed together. 48 was fastest on a CPU with 133 and 338 tokens; 64 took up to 7% longer."""


class AttentionCall(Protocol):
    """Computes the attention of one forward in place of torch (on a GPU: `KernelCall`)."""

    def attention(self, query: Tensor, scaling: float | None) -> Tensor:
        """Attention of `query` [1, heads, queries, dim] over the prompt's buffers, [1, queries, heads, dim]."""
        ...


class Blocks:
    """The blocks in which selected tokens are computed: first token, the token behind the last one, and how many keys they see at most.

    Args:
        positions: of the tokens, [queries], ascending.
    """

    def __init__(self, positions: Tensor):
        count, ends = positions.shape[0], positions[BLOCK - 1 :: BLOCK].tolist()
        if len(ends) * BLOCK < count:
            ends.append(int(positions[-1]))
        self.bounds = [(i * BLOCK, min((i + 1) * BLOCK, count), end + 1) for i, end in enumerate(ends)]
        self._whole = self.bounds

    def narrow(self, rows: Tensor) -> None:
        """The keys are those at the places `rows` alone from now on, int64, ascending. It may be called again, with other rows."""
        ends = torch.searchsorted(rows, rows.new_tensor([end for _, _, end in self._whole])).tolist()
        self.bounds = [(start, stop, end) for (start, stop, _), end in zip(self._whole, ends, strict=True)]


current_blocks: ContextVar[Blocks | None] = ContextVar("cachetune_attention_blocks", default=None)
current_watch: ContextVar[Watch | None] = ContextVar("cachetune_watch", default=None)
current_call: ContextVar[AttentionCall | None] = ContextVar("cachetune_kernel_call", default=None)


@contextmanager
def _holding(variable: ContextVar[_T | None], value: _T) -> Iterator[None]:
    """While the context is open, the variable has that value. It is set inside `try`, because Ctrl-C may arrive right after it."""
    before = variable.get()
    try:
        variable.set(value)
        yield
    finally:
        variable.set(before)


@contextmanager
def by_kernel(call: AttentionCall) -> Iterator[None]:
    """While the context is open, `call` computes attention."""
    with _holding(current_call, call):
        yield


@contextmanager
def by_position(positions: Tensor) -> Iterator[None]:
    """While the context is open, the queries of attention calls are at `positions` [queries], ascending."""
    with _holding(current_blocks, Blocks(positions)):
        yield


def narrow(rows: Tensor) -> None:
    """From the next attention call inside `by_position` on, keys and values are those at the places `rows` alone, int64, ascending."""
    if (blocks := current_blocks.get()) is not None:
        blocks.narrow(rows)


@contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """While the context is open, attention calls inside `by_position` show their last tokens to `watch`."""
    with _holding(current_watch, watch):
        yield


def blocked_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of query [1, heads, queries, dim] over key and value [1, kv_heads, length, dim].

    `attention_mask` is additive, [1, 1, queries, length]. Returns [1, queries, heads, dim], as transformers expects it.
    """
    call = current_call.get()
    if call is not None:
        return call.attention(query, scaling), None
    blocks = current_blocks.get()
    if blocks is None or attention_mask is None or blocks.bounds[-1][1] != query.shape[2]:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    shown: list[Tensor] = []
    bounds = blocks.bounds
    if (watch := current_watch.get()) is not None:
        shown = [watch.attend(module.layer_idx, query, key, value, attention_mask, scaling)]
        rest = query.shape[2] - watch.taken(query.shape[2])
        bounds = [(start, min(stop, rest), end) for start, stop, end in bounds if start < rest]
    grouped = query.shape[1] != key.shape[1]
    if grouped and query.device.type == "cuda":
        # With a mask, CUDA's fused kernels don't take grouped heads.
        groups = query.shape[1] // key.shape[1]
        key, value, grouped = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), False
    parts = [
        F.scaled_dot_product_attention(
            query[:, :, start:stop],
            key[:, :, :end],
            value[:, :, :end],
            attn_mask=attention_mask[:, :, start:stop, :end],
            scale=scaling,
            enable_gqa=grouped,
        )
        for start, stop, end in bounds
    ]
    return torch.cat([*parts, *shown], dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, blocked_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
