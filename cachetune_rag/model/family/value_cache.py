"""A cache that shows the keys and values of a forward, layer by layer, instead of keeping them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class ValueCache(Cache):
    """Passes each layer's (rotated) keys and values [batch, kv_heads, tokens, head_dim] on and keeps nothing.

    Args:
        layers: the number of layers.
        receive: called with layer, keys and values.
        before: keys and values of each layer, [1, kv_heads, tokens, head_dim], that every sequence of the batch attends to
            as if they stood before its own; None for nothing.
    """

    def __init__(
        self,
        layers: int,
        receive: Callable[[int, Tensor, Tensor], None],
        before: Sequence[tuple[Tensor, Tensor]] | None = None,
    ):
        super().__init__(layers=[_ValueLayer(i, receive, None if before is None else before[i]) for i in range(layers)])


class _ValueLayer(CacheLayerMixin):
    is_sliding = False

    def __init__(
        self, layer: int, receive: Callable[[int, Tensor, Tensor], None], before: tuple[Tensor, Tensor] | None
    ):
        super().__init__()
        self._layer, self._receive, self._before = layer, receive, before

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self._receive(self._layer, key_states, value_states)
        if self._before is None:
            return key_states, value_states
        keys, values = (rows.expand(key_states.shape[0], -1, -1, -1) for rows in self._before)
        return torch.cat((keys, key_states), dim=2), torch.cat((values, value_states), dim=2)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None: ...

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length + (0 if self._before is None else self._before[0].shape[2]), 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length
