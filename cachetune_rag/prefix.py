"""KV of prompt prefixes that were computed lately.

What stands before the first chunk (system text, instructions) is mostly the same in every request. Its keys and values depend
on nothing but itself, so keeping them is exact; a request then computes the chosen chunk tokens and the query only.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor

from cachetune_rag.model import KVBuffers

BUDGET = 256 << 20
"""Bytes of prefixes kept, on the model's device."""


class PrefixCache:
    """The most recently used prefixes by their token ids, within a budget of bytes. The caller holds the model's lock."""

    def __init__(self, budget: int = BUDGET):
        self._budget, self._bytes = budget, 0
        self._entries: OrderedDict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = OrderedDict()

    def fill(self, prefix: tuple[int, ...], buffers: KVBuffers) -> bool:
        """Put the prefix's rows at the beginning of the buffers; False if it isn't known."""
        layers = self._entries.get(prefix)
        if layers is None:
            return False
        self._entries.move_to_end(prefix)
        rows = [rows[: len(prefix)] for pair in zip(buffers.key_rows, buffers.value_rows, strict=True) for rows in pair]
        torch._foreach_copy_(rows, [kept for pair in layers for kept in pair])
        return True

    def keep(self, prefix: tuple[int, ...], buffers: KVBuffers) -> None:
        """Remember the first rows of buffers in which the prefix was computed."""
        if prefix in self._entries or not prefix:
            return
        count = len(prefix)
        layers = [
            (k[:count].clone(), v[:count].clone()) for k, v in zip(buffers.key_rows, buffers.value_rows, strict=True)
        ]
        size = _size(layers)
        if size > self._budget:
            return
        self._entries[prefix] = layers
        self._bytes += size
        while self._bytes > self._budget:
            _, oldest = self._entries.popitem(last=False)
            self._bytes -= _size(oldest)


def _size(layers: list[tuple[Tensor, Tensor]]) -> int:
    return sum(t.numel() * t.element_size() for pair in layers for t in pair)
