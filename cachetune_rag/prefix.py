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
        self._entries: OrderedDict[tuple[int, ...], list[Tensor]] = OrderedDict()

    def fill(self, prefix: tuple[int, ...], buffers: KVBuffers) -> bool:
        """Put the prefix's rows at the beginning of the buffers; False if it isn't known."""
        kept = self._entries.get(prefix)
        if kept is None:
            return False
        self._entries.move_to_end(prefix)
        torch._foreach_copy_(buffers.first_rows(len(prefix)), kept)
        return True

    def keep(self, prefix: tuple[int, ...], buffers: KVBuffers) -> None:
        """Remember the first rows of buffers in which the prefix was computed."""
        if prefix in self._entries or not prefix:
            return
        rows = [first.clone() for first in buffers.first_rows(len(prefix))]
        size = _size(rows)
        if size > self._budget:
            return
        self._entries[prefix] = rows
        self._bytes += size
        while self._bytes > self._budget:
            _, oldest = self._entries.popitem(last=False)
            self._bytes -= _size(oldest)


def _size(rows: list[Tensor]) -> int:
    return sum(part.numel() * part.element_size() for part in rows)
