"""The KV of one prompt in the order of positions, and the cache through which a model writes and reads it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from cachetune_rag.model.libraries.private import copy_all
from cachetune_rag.model.plain.shift import RowShift
from cachetune_store.layout import LayerSpec


class KVBuffers:
    """Keys (rotated) and values of a prompt, per layer.

    Memory is [length, kv_heads, head_dim], so that a stored row is copied in one piece. `keys` and `values` return the views
    [1, kv_heads, length, head_dim] that attention reads.

    Args:
        specs: shapes of each layer's keys and values.
        length: tokens of the prompt.
        dtype, device: dtype and device of the memory, which is not initialised.
        answer_rows: number of rows behind the prompt's, for tokens of an answer. They are in no view.
        memory: uint8 of `size_of` bytes, to be used; None takes memory of its own. In it, each layer's keys and values lie behind those of the layer
            before.
        await_layer: lets the current stream wait until nobody else uses a layer's part of `memory`; None: nobody does.

    Attributes:
        key_rows, value_rows: of each layer, [length, kv_heads, head_dim].
    """

    def __init__(
        self,
        specs: Sequence[LayerSpec],
        length: int,
        dtype: torch.dtype,
        device: torch.device,
        answer_rows: int = 0,
        memory: Tensor | None = None,
        await_layer: Callable[[int], None] | None = None,
    ):
        self.length, self.answer_rows = length, answer_rows
        self._await_layer = await_layer
        self.dtype, self.device, self._specs = dtype, device, list(specs)
        self._allocate(memory)

    @staticmethod
    def size_of(specs: Sequence[LayerSpec], rows: int, dtype: torch.dtype) -> int:
        """Bytes that buffers of so many rows take, `answer_rows` included."""
        return sum(KVBuffers.layer_sizes(specs, rows, dtype))

    @staticmethod
    def layer_sizes(specs: Sequence[LayerSpec], rows: int, dtype: torch.dtype) -> list[int]:
        """The same, layer by layer."""
        return [rows * _row_bytes([spec], dtype) for spec in specs]

    def _allocate(self, memory: Tensor | None = None) -> None:
        rows = self.length + self.answer_rows
        key_shapes = [(rows, s.heads, s.head_dim) for s in self._specs]
        value_shapes = [(rows, s.heads, s.v_head_dim) for s in self._specs]
        if memory is None:
            keys, values = (_empty(shapes, self.dtype, self.device) for shapes in (key_shapes, value_shapes))
        else:
            numbers = memory[: self.size_of(self._specs, rows, self.dtype)].view(self.dtype)
            keys, values = _parts(numbers, key_shapes, value_shapes)
        self._keys, self._all_keys, self.key_rows = _shown(*keys, self.length)
        self._values, self._all_values, self.value_rows = _shown(*values, self.length)

    def grow(self, rows: int) -> None:
        """Add so many rows for an answer. All rows are copied, which takes twice the memory for a moment."""
        before = [*self._all_keys, *self._all_values]
        self.answer_rows += rows
        self._allocate()
        self._await_layer = None
        for old, new in zip(before, [*self._all_keys, *self._all_values], strict=True):
            new[: old.shape[0]].copy_(old)

    def keys(self, layer: int) -> Tensor:
        """Keys of one layer, [1, kv_heads, length, head_dim]."""
        return self.key_rows[layer].transpose(0, 1)[None]

    def values(self, layer: int) -> Tensor:
        """Values of one layer, [1, kv_heads, length, v_head_dim]."""
        return self.value_rows[layer].transpose(0, 1)[None]

    def first_rows(self, count: int) -> list[Tensor]:
        """Views of the first `count` keys and values, of all layers together if their memory is one piece."""
        if self._keys is not None and self._values is not None:
            return [self._keys[:, :count], self._values[:, :count]]
        return [rows[:count] for rows in (*self.key_rows, *self.value_rows)]

    def used_on(self, stream: torch.cuda.Stream) -> None:
        """Another stream than the one that they were made on works with these buffers: their memory is not given away before that is done."""
        for rows in (*self._all_keys, *self._all_values):
            rows.record_stream(stream)

    @property
    def row_bytes(self) -> int:
        """Bytes that one token takes, over all layers."""
        return _row_bytes(self._specs, self.dtype)

    def await_layer(self, layer: int) -> None:
        """Let the current stream wait until nobody else uses the memory of a layer. Called before anything is written to it."""
        if self._await_layer is not None:
            self._await_layer(layer)

    def fill_first(self, count: int, other: KVBuffers) -> None:
        """Copy the first `count` rows of other buffers of the same model here."""
        for layer in range(len(self.key_rows)):
            self.await_layer(layer)
        copy_all(self.first_rows(count), other.first_rows(count))

    def copy_first(self, count: int) -> KVBuffers:
        """New buffers with the first `count` rows."""
        made = KVBuffers(self._specs, count, self.dtype, self.device)
        made.fill_first(count, self)
        return made

    def to_cache(self, count: int | None = None) -> DynamicCache:
        """A transformers cache over the same memory, for decoding, with the first `count` rows or all of them.

        It is made without a config, so that layers with a sliding window keep all their rows as well.
        """
        cache = DynamicCache()
        for layer in range(len(self.key_rows)):
            entry = DynamicLayer()
            keys, values = self.keys(layer)[:, :, :count], self.values(layer)[:, :, :count]
            entry.lazy_initialization(keys, values)
            entry.keys, entry.values = keys, values
            cache.layers.append(entry)
        return cache

    def show_in(self, cache: Cache) -> None:
        """Let `cache`, which has the same number of layers, use the prompt's rows."""
        for layer, entry in enumerate(cache.layers):
            entry.keys, entry.values = self.keys(layer), self.values(layer)

    def take(self, cache: Cache) -> None:
        """Copy the rows of a cache of `length` tokens here, and let the cache use them from now on."""
        self.take_first(cache)
        self.show_in(cache)

    def take_first(self, cache: Cache) -> None:
        """Fill these buffers with the first rows of a cache, which is not changed."""
        for layer, entry in enumerate(cache.layers):
            self.keys(layer).copy_(entry.keys[:, :, : self.length])
            self.values(layer).copy_(entry.values[:, :, : self.length])


class ScatterCache(Cache):
    """The cache of a forward over selected tokens. It writes their keys and values into the buffers.

    `before(layer)` is called before a layer's buffer is used, to load the reused rows. `after(layer, keys, values)` is called when the buffer
    is complete, with what attention gets: [1, kv_heads, rows, dim]. `shift` then has been added to the reused rows. `rows(layer)` gives the places
    of the rows that attention gets; None for all.
    """

    def __init__(
        self,
        buffers: KVBuffers,
        positions: Tensor,
        before: Callable[[int], None] | None = None,
        after: Callable[[int, Tensor, Tensor], None] | None = None,
        shift: RowShift | None = None,
        rows: Callable[[int], Tensor | None] | None = None,
    ):
        count = len(buffers.key_rows)
        layers = [_ScatterLayer(buffers, i, positions, before, after, shift, rows) for i in range(count)]
        super().__init__(layers=layers)


class _ScatterLayer(CacheLayerMixin):
    """One layer of a `ScatterCache`."""

    is_sliding = False

    def __init__(
        self,
        buffers: KVBuffers,
        layer: int,
        positions: Tensor,
        before: Callable[[int], None] | None,
        after: Callable[[int, Tensor, Tensor], None] | None,
        shift: RowShift | None,
        rows: Callable[[int], Tensor | None] | None,
    ):
        super().__init__()
        self._buffers, self._layer, self._positions = buffers, layer, positions
        self._before, self._after, self._shift, self._rows = before, after, shift, rows

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write [1, kv_heads, selected, head_dim] to the rows at their positions, and return the rows that attention gets."""
        layer, buffers = self._layer, self._buffers
        if self._before is not None:
            self._before(layer)
        key_rows, value_rows = buffers.key_rows[layer], buffers.value_rows[layer]
        fresh_keys, fresh_values = key_states[0].transpose(0, 1), value_states[0].transpose(0, 1)
        if self._shift is not None:
            self._shift.apply(layer, key_rows, value_rows, fresh_keys, fresh_values)
        key_rows.index_copy_(0, self._positions, fresh_keys)
        value_rows.index_copy_(0, self._positions, fresh_values)
        keys, values = buffers.keys(layer), buffers.values(layer)
        if self._rows is not None and (rows := self._rows(layer)) is not None:
            keys, values = (each.index_select(0, rows).transpose(0, 1)[None] for each in (key_rows, value_rows))
        if self._after is not None:
            self._after(layer, keys, values)
        return keys, values

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the buffers exist."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys. The mask is given, so nothing is computed from them."""
        return self._buffers.length, 0

    def get_seq_length(self) -> int:
        """0, because positions are given."""
        return 0

    def get_max_length(self) -> int:
        """The buffers' length."""
        return self._buffers.length

    get_max_cache_shape = get_max_length  # its name before transformers 5.24


def _row_bytes(specs: Sequence[LayerSpec], dtype: torch.dtype) -> int:
    return sum(s.heads * (s.head_dim + s.v_head_dim) for s in specs) * dtype.itemsize


_Pieces = tuple[Tensor | None, list[Tensor]]
"""Tensors, and before them the one piece that all of them are parts of, if their shapes are equal."""


def _empty(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> _Pieces:
    """Uninitialised tensors. On a GPU, tensors of equal shape are one piece, because each allocation takes time."""
    if device.type == "cuda" and len(set(shapes)) == 1:
        whole = torch.empty(len(shapes), *shapes[0], dtype=dtype, device=device)
        return whole, list(whole.unbind())
    return None, [torch.empty(shape, dtype=dtype, device=device) for shape in shapes]


def _parts(
    numbers: Tensor, key_shapes: Sequence[tuple[int, ...]], value_shapes: Sequence[tuple[int, ...]]
) -> tuple[_Pieces, _Pieces]:
    """Keys and values as `_empty` gives them, in memory that is there already: each layer's behind those of the layer before."""
    if numbers.device.type == "cuda" and len(set(key_shapes)) == len(set(value_shapes)) == 1:
        layers = numbers.view(len(key_shapes), -1)
        count = math.prod(key_shapes[0])
        keys = layers[:, :count].view(len(key_shapes), *key_shapes[0])
        values = layers[:, count:].view(len(value_shapes), *value_shapes[0])
        return (keys, list(keys.unbind())), (values, list(values.unbind()))
    shapes = [shape for pair in zip(key_shapes, value_shapes, strict=True) for shape in pair]
    pieces = numbers.split([math.prod(shape) for shape in shapes])
    every = [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]
    return (None, every[::2]), (None, every[1::2])


def _shown(whole: Tensor | None, every: list[Tensor], shown: int) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
    """Tensors, and views of their first `shown` rows."""
    if all(rows.shape[0] == shown for rows in every):
        return whole, every, every
    return whole, every, [rows[:shown] for rows in every] if whole is None else list(whole[:, :shown].unbind())
