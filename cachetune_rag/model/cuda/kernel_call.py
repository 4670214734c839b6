"""What a forward does through kernels instead of the model's own code: storing keys and values, and attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from cachetune_rag.kernels import Listed
from cachetune_rag.model.family.taps import StopForward
from cachetune_store.layout import LayerSpec


@dataclass
class Probing:
    """What a probe adds up about the attention of the prompt's last tokens.

    Attributes:
        watched: int64 [1] on the device; how many last tokens are watched.
        last_layer: the forward ends after this layer's attention.
        total: float32 [rows, at least length], to which results are added. It has one row for the attention that each token receives, or
            one for each key-value head for the expected error.
        deviations: int64 [1] on the device; the address of the prompt's deviations, float16 [length, columns]. None: the attention is
            added up, not the expected error.
        columns: the first column of each layer in the deviations, and then the number of all columns.
        gains: for each layer, float32 [heads].
        near: float32 [tokens]; holds 1 / |x| of the current layer's input.
        listed: the rows that layers from number `listed_from` on use; None: all layers use all rows.
    """

    watched: Tensor
    last_layer: int
    total: Tensor
    deviations: Tensor | None
    columns: Sequence[int]
    gains: Sequence[Tensor]
    near: Tensor
    listed: Listed | None = None
    listed_from: int = 0

    def rows(self, layer: int) -> Listed | None:
        """The rows that a layer uses, None for all."""
        return self.listed if layer >= self.listed_from else None


@dataclass
class Shifting:
    """The chunk shift of a forward: arguments of `kernels.shift.shift`, which describes them."""

    known: Tensor
    spans: Tensor
    rotations: Tensor
    turnings: Sequence[tuple[Tensor, Tensor] | None]
    moved: tuple[Tensor, Tensor]


@dataclass
class KernelCall:
    """One forward through the kernels.

    Attributes:
        table: addresses of the prompt's buffers (`kernels.row_addresses`).
        positions: int64 [tokens], ascending. Padding stands in front, at -1.
        specs, windows: for every layer, the shapes of its keys and values, and how many keys back it sees.
        probing, shifting: what is done besides, if anything.
        layer: the layer whose attention comes next.
    """

    table: Tensor
    positions: Tensor
    specs: Sequence[LayerSpec]
    windows: Sequence[int | None]
    probing: Probing | None = None
    shifting: Shifting | None = None
    layer: int = 0

    @property
    def watches_inputs(self) -> bool:
        """Whether `see_input` has to be called."""
        return self.probing is not None and self.probing.deviations is not None

    def see_input(self, layer: int, hidden: Tensor) -> None:
        """Take the input of a decoder layer, [1, tokens, width]."""
        from cachetune_rag.kernels.watched_attention import nearness

        assert self.probing is not None
        if layer <= self.probing.last_layer:
            nearness(hidden, self.probing.near)

    def scatter(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Write a layer's fresh keys and values to their places. Its attention comes next."""
        from cachetune_rag.kernels.rows import scatter

        self.layer = layer
        if (shifting := self.shifting) is not None:
            from cachetune_rag.kernels.shift import shift

            turning = shifting.turnings[layer]
            shift(
                keys,
                values,
                self.table,
                layer,
                self.positions,
                shifting.known,
                shifting.spans,
                shifting.rotations,
                turning,
                shifting.moved,
            )
        scatter(keys, values, self.table, layer, self.positions)

    def attention(self, query: Tensor, scaling: float | None) -> Tensor:
        """Attention of query [1, heads, tokens, dim] over the layer's buffers: [1, tokens, heads, v_dim]."""
        from cachetune_rag.kernels.attention import attend

        spec, window = self.specs[self.layer], self.windows[self.layer]
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        query = query if query.stride(3) == 1 else query.contiguous()
        lse = None
        if self.probing is not None:
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
            listed=None if self.probing is None else self.probing.rows(self.layer),
        )
        if self.probing is not None and lse is not None:
            self._add_up(self.probing, query, out, lse, scale, window)
            if self.layer == self.probing.last_layer:
                raise StopForward
        return out

    def _add_up(
        self, probing: Probing, query: Tensor, out: Tensor, lse: Tensor, scale: float, window: int | None
    ) -> None:
        from cachetune_rag.kernels.watched_attention import disturb, receive

        layer, kv_heads = self.layer, self.specs[self.layer].heads
        if probing.deviations is None:
            receive(
                query,
                lse,
                self.table,
                layer,
                self.positions,
                probing.watched,
                probing.total[0],
                kv_heads=kv_heads,
                scale=scale,
                window=window,
                listed=probing.rows(layer),
            )
            return
        disturb(
            query,
            out,
            lse,
            probing.near,
            probing.gains[layer],
            self.table,
            layer,
            self.positions,
            probing.watched,
            probing.deviations,
            probing.columns[layer],
            probing.columns[-1],
            probing.total,
            kv_heads=kv_heads,
            scale=scale,
            window=window,
            listed=probing.rows(layer),
        )


class KernelCache(Cache):
    """The cache of a forward through the kernels. It writes fresh keys and values to the prompt's buffers."""

    def __init__(self, call: KernelCall, before: Callable[[int], None]):
        super().__init__(layers=[_KernelLayer(call, i, before) for i in range(len(call.specs))])

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """See `_KernelLayer.update`."""
        return self.layers[layer_idx].update(key_states, value_states)


class _KernelLayer(CacheLayerMixin):
    is_sliding = False

    def __init__(self, call: KernelCall, layer: int, before: Callable[[int], None]):
        super().__init__()
        self._call, self._layer, self._before = call, layer, before

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write keys and values [1, kv_heads, tokens, head_dim] to the buffers, from which attention reads. They are returned unchanged."""
        self._before(self._layer)
        self._call.scatter(self._layer, key_states, value_states)
        return key_states, value_states

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do, because the buffers exist already."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Without effect, because there is no mask."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """0, because positions are given explicitly."""
        return 0

    def get_max_length(self) -> int:
        """-1: the cache sets no limit."""
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.24
