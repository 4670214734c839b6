"""Precompute: runs of chunks through the model behind a lead-in, keeping keys before rotation, and values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


@dataclass(frozen=True)
class ChunkKV:
    """What is stored of a chunk.

    Attributes:
        layers: per layer, keys before rotation and values, each [tokens, kv_heads, head_dim].
        deviations: how far they were apart behind different lead-ins (see `MeanKV`); None if there was one.
    """

    layers: list[tuple[Tensor, Tensor]]
    deviations: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Number of chunk tokens."""
        return int(self.layers[0][0].shape[0])


@dataclass(frozen=True)
class LeadKV:
    """The KV of a lead-in, to stand before any number of chunks.

    Attributes:
        tokens: its length.
        layers: per layer, keys as rotated for positions 0, 1, ... and values, each [1, kv_heads, tokens, head_dim].
    """

    tokens: int
    layers: list[tuple[Tensor, Tensor]]


class ValueCache(Cache):
    """Hands each layer's (rotated) keys and values [batch, kv_heads, tokens, head_dim] on and keeps nothing.

    Args:
        layers: how many.
        receive: gets layer, keys, values.
        lead: what attention finds before them.
    """

    def __init__(self, layers: int, receive: Callable[[int, Tensor, Tensor], None], lead: LeadKV | None = None):
        super().__init__(layers=[_ValueLayer(i, receive, lead) for i in range(layers)])


class _ValueLayer(CacheLayerMixin):
    is_sliding = False

    def __init__(self, layer: int, receive: Callable[[int, Tensor, Tensor], None], lead: LeadKV | None):
        super().__init__()
        self._layer, self._receive = layer, receive
        self._lead = None if lead is None else lead.layers[layer]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self._receive(self._layer, key_states, value_states)
        if self._lead is None:
            return key_states, value_states
        keys, values = (rows.expand(key_states.shape[0], -1, -1, -1) for rows in self._lead)
        return torch.cat((keys, key_states), dim=2), torch.cat((values, value_states), dim=2)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None: ...

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length + (0 if self._lead is None else self._lead[0].shape[2]), 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length


def pad_right(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Token ids [batch, longest]. Padding stands on the right, where causal attention never looks."""
    longest = max(len(r) for r in rows)
    return torch.tensor([[*r, *([r[-1]] * (longest - len(r)))] for r in rows], device=device)
