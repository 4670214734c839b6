"""The mean of chunks' keys and values behind several lead-ins, and how far these were apart (docs/selection.md)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from cachetune_rag.model import ChunkKV, ModelAdapter
from cachetune_rag.model.plain.capture import LeadInKV

_MOST = torch.finfo(torch.float16).max


class MeanKV:
    """Adds up the captures of a batch behind one lead-in after another, without keeping them (Welford's running mean and variance).

    K_c and V_c are a token's key (before rotation) and value behind lead-in c, K and V are their means over all lead-ins. It gives:

        sK = sqrt(mean_c |K_c - K|^2)        sV = sqrt(mean_c (V_c - V)^T Gram (V_c - V))

    for every layer and key-value head: the size of a key's error, and the size of the error that a value's error makes in the layer's
    output. All is computed in float32, whatever the model's dtype.

    Args:
        grams: by layer, `output.gram` [kv_heads, v_dim, v_dim]; None for the identity.
    """

    def __init__(self, grams: Sequence[Tensor | None]):
        self._grams = grams
        self._count = 0
        self._means: list[tuple[Tensor, Tensor]] = []
        self._squares: list[tuple[Tensor, Tensor]] = []
        self._dtype = torch.float32

    def begin(self) -> None:
        """Begin with another lead-in, whose captures follow layer by layer."""
        self._count += 1

    def add_layer(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Add a layer's keys and values [batch, tokens, kv_heads, head_dim]."""
        self._dtype = keys.dtype
        if self._count == 1:
            self._means.append((keys.float().clone(), values.float().clone()))
            zero = self._means[layer][0].new_zeros(keys.shape[:3])
            self._squares.append((zero, zero.clone()))
            return
        mean_k, mean_v = self._means[layer]
        off_k, off_v = keys.float() - mean_k, values.float() - mean_v
        # The sum of squares about the mean grows by (1 - 1/c) |x - mean before|^2.
        share = 1 - 1 / self._count
        self._squares[layer][0].add_(off_k.square().sum(-1), alpha=share)
        self._squares[layer][1].add_(_squared(off_v, self._grams[layer]), alpha=share)
        mean_k.add_(off_k, alpha=1 / self._count)
        mean_v.add_(off_v, alpha=1 / self._count)

    def take(self, lengths: Sequence[int]) -> list[ChunkKV]:
        """The means and deviations of the batch's chunks. The float32 means are freed one by one while they are cast.

        Args:
            lengths: how many tokens each chunk has.
        """
        layers = []
        for i in range(len(self._means)):
            means, self._means[i] = self._means[i], (torch.empty(0), torch.empty(0))
            layers.append(tuple(mean.to(self._dtype) for mean in means))
        spread = None
        if self._count > 1:
            columns = [square for pair in self._squares for square in pair]
            spread = (torch.cat(columns, dim=2) / self._count).sqrt_().clamp_max_(_MOST).half()
        self._means, self._squares = [], []
        return [
            ChunkKV([(k[row, :n], v[row, :n]) for k, v in layers], None if spread is None else spread[row, :n])
            for row, n in enumerate(lengths)
        ]


class MeanCapture:
    """Captures chunks behind one lead-in or several. Several are run once each, and their KV is kept for all chunks.

    Args:
        adapter: the model.
        lock: held for one forward at a time, so that requests need not wait for all lead-ins.
    """

    def __init__(self, adapter: ModelAdapter, lock: AbstractContextManager[Any]):
        self._adapter, self._lock = adapter, lock
        self._lead_ins: dict[tuple[int, ...], LeadInKV] = {}

    @staticmethod
    def tokens_run(tokens: int, lead_ins: Sequence[tuple[int, ...]]) -> int:
        """How many tokens one forward has for a chunk of `tokens` tokens: a single lead-in is run together with every chunk."""
        return tokens + (len(lead_ins[0]) if len(lead_ins) == 1 else 0)

    def capture(
        self,
        chunks: Sequence[Sequence[int]],
        lead_ins: Sequence[tuple[int, ...]],
        turn: AbstractContextManager[Any] | None = None,
    ) -> list[ChunkKV]:
        """The KV of chunks, run in one batch: as computed behind a single lead-in, or the mean over several and the deviations.

        Args:
            chunks: token ids of each chunk.
            lead_ins: what to run them behind.
            turn: entered for every forward in place of the lock, which it has to take itself.
        """
        lock = self._lock if turn is None else turn
        if len(lead_ins) == 1:
            with lock:
                return self._adapter.capture(chunks, lead_ins[0])
        mean = MeanKV(self._adapter.value_grams)
        for lead_in in lead_ins:
            with lock:
                mean.begin()
                self._adapter.capture_behind(chunks, self._lead_in_kv(lead_in), mean.add_layer)
        return mean.take([len(c) for c in chunks])

    def _lead_in_kv(self, lead_in: tuple[int, ...]) -> LeadInKV | None:
        if lead_in and lead_in not in self._lead_ins:
            self._lead_ins[lead_in] = self._adapter.lead_kv(lead_in)
        return self._lead_ins.get(lead_in)


def _squared(off: Tensor, gram: Tensor | None) -> Tensor:
    """off^T gram off over the last dimension of [batch, tokens, kv_heads, v_dim]."""
    if gram is None:
        return off.square().sum(-1)
    by_head = off.transpose(1, 2)  # [batch, kv_heads, tokens, v_dim]
    return ((by_head @ gram) * by_head).sum(-1).transpose(1, 2).clamp_min(0)
