"""Precompute: one run of chunks through the model, keeping keys before rotation, and values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


@dataclass(frozen=True)
class ChunkKV:
    """What is stored of a chunk: per layer, keys before rotation and values, each [tokens, kv_heads, head_dim]."""

    layers: list[tuple[Tensor, Tensor]]

    @property
    def tokens(self) -> int:
        """Number of chunk tokens."""
        return int(self.layers[0][0].shape[0])


class ValueCache(Cache):
    """Hands each layer's (rotated) keys and values on and keeps nothing."""

    def __init__(self, layers: int, receive: Callable[[int, Tensor, Tensor], None]):
        super().__init__(layers=[_ValueLayer(i, receive) for i in range(layers)])


class _ValueLayer(CacheLayerMixin):
    is_sliding = False

    def __init__(self, layer: int, receive: Callable[[int, Tensor, Tensor], None]):
        super().__init__()
        self._layer, self._receive = layer, receive

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self._receive(self._layer, key_states, value_states)
        return key_states, value_states

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None: ...

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length


def pad_right(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Token ids [batch, longest]. Padding stands on the right, where causal attention never looks."""
    longest = max(len(r) for r in rows)
    return torch.tensor([[*r, *([r[-1]] * (longest - len(r)))] for r in rows], device=device)
