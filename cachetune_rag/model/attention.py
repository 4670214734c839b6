"""Attention of the selected tokens over the whole buffer.

A mask by true position hides, from every selected token, the keys behind it; scaled-dot-product attention would still
compute them. The tokens stand in ascending order, so a block of them needs no key behind its last token: computing block by
block halves the work. This is registered with transformers' `AttentionInterface`, its public way to bring an attention
function, and used in place of "sdpa" while a selective forward runs. Outside of one it is transformers' sdpa.

On a CUDA device the kernels of `cachetune_rag.kernels` take its place: they need no mask, and read grouped heads as they lie.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from cachetune_store.layout import LayerSpec

NAME = "cachetune_sdpa"
BLOCK = 64
"""Selected tokens computed together (measured best on a CPU, flat from 32 to 96)."""

_bounds: ContextVar[list[tuple[int, int, int]] | None] = ContextVar("cachetune_attention_bounds", default=None)


class StopForward(Exception):
    """Ends a forward after the layers that were wanted."""


@dataclass
class KernelCall:
    """One forward through the kernels.

    Attributes:
        table: addresses of the prompt's buffers (`kernels.AddressTable`).
        positions: int64 [tokens], ascending, -1 for padding in front.
        specs, windows: of every layer.
        layer: the layer whose attention comes next.
        mass: float32 [at least length]; if given, adds up what every key receives from the last `queries` tokens.
        last_layer: the forward ends after this layer's attention; None for all.
    """

    table: Tensor
    positions: Tensor
    specs: Sequence[LayerSpec]
    windows: Sequence[int | None]
    layer: int = 0
    mass: Tensor | None = None
    queries: int = 0
    last_layer: int | None = None

    def scatter(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Put a layer's fresh keys and values to their places; its attention comes next."""
        from cachetune_rag.kernels.rows import scatter

        self.layer = layer
        scatter(keys, values, self.table, layer, self.positions)

    def attention(self, query: Tensor, scaling: float | None) -> Tensor:
        """Attention of query [1, heads, tokens, dim] over the layer's buffers: [1, tokens, heads, v_dim]."""
        from cachetune_rag.kernels.attention import attend, receive

        spec, window = self.specs[self.layer], self.windows[self.layer]
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        query = query if query.stride(3) == 1 else query.contiguous()
        lse = None
        if self.mass is not None:
            lse = torch.empty(query.shape[2], query.shape[1], dtype=torch.float32, device=query.device)
        out = attend(
            query,
            self.table,
            self.layer,
            self.positions,
            kv_heads=spec.heads,
            v_dim=spec.v_head_dim,
            scale=scale,
            window=window,
            lse=lse,
        )
        if self.mass is not None and lse is not None:
            receive(
                query,
                lse,
                self.table,
                self.layer,
                self.positions,
                self.mass,
                queries=self.queries,
                kv_heads=spec.heads,
                scale=scale,
                window=window,
            )
        if self.layer == self.last_layer:
            raise StopForward
        return out


_call: ContextVar[KernelCall | None] = ContextVar("cachetune_kernel_call", default=None)


@contextmanager
def by_kernel(call: KernelCall) -> Iterator[None]:
    """While the context is open, attention calls are `call`'s."""
    token = _call.set(call)
    try:
        yield
    finally:
        _call.reset(token)


@contextmanager
def by_position(positions: Tensor) -> Iterator[None]:
    """While the context is open, attention calls are over queries at `positions` [queries], ascending."""
    ends = positions[BLOCK - 1 :: BLOCK].tolist()
    count = positions.shape[0]
    if len(ends) * BLOCK < count:
        ends.append(int(positions[-1]))
    token = _bounds.set([(i * BLOCK, min((i + 1) * BLOCK, count), end + 1) for i, end in enumerate(ends)])
    try:
        yield
    finally:
        _bounds.reset(token)


def blocked_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of query [1, heads, queries, dim] over key and value [1, kv_heads, length, dim].

    `attention_mask` is additive, [1, 1, queries, length]. Returns [1, queries, heads, dim], as transformers wants it.
    """
    call = _call.get()
    if call is not None:
        return call.attention(query, scaling), None
    bounds = _bounds.get()
    if bounds is None or attention_mask is None or bounds[-1][1] != query.shape[2]:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
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
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, blocked_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
