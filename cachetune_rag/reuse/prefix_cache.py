"""Keeps the KV of the beginnings of recent prompts.

A prompt often begins like an earlier one (system text, instructions, few-shot examples, an agent's steps so far). Keys and values depend on
nothing but the tokens before them, so those of the longest common beginning can be taken over, and that is exact. Only rows before the first
reused chunk are kept: tokens behind a reused chunk look at approximate rows, so their own rows are approximate too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cachetune_rag.model import KVBuffers

BUDGET = 256 << 20
"""Bytes of beginnings kept, on the model's device."""
MOST = 64
"""Most beginnings that are kept. Each is compared with every prompt."""
WORTH = 64
"""Tokens that a beginning must have beyond those that it has in common with a kept one, unless that one is much shorter: a prompt that
differs in its question alone is no reason to keep a thousand tokens twice. A beginning that continues a kept one replaces it."""

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class KeptRows:
    """The KV of the first `count` tokens of a prompt: the first rows of `buffers`, which may have more."""

    buffers: KVBuffers
    count: int


@dataclass(frozen=True)
class _Entry:
    ids: Ids
    kind: bool
    buffers: KVBuffers

    def common(self, ids: Ids) -> int:
        """How many tokens of a prompt are the same from its beginning on."""
        count = min(len(ids), len(self.ids))
        differ = self.ids[:count] != ids[:count]
        return int(differ.argmax()) if differ.any() else count


class PrefixCache:
    """The most recently used beginnings, within a budget of bytes. The caller holds the model's lock.

    Beginnings of one kind are never given to prompts of another: a long-rope model computes short prompts with other rotations.
    """

    def __init__(self, budget: int = BUDGET):
        self._budget = budget
        self._entries: list[_Entry] = []  # the one that was used longest ago first

    def find(self, ids: Ids, limit: int, kind: bool = False) -> KeptRows | None:
        """The longest beginning of a prompt that is kept, of at most `limit` tokens; None if there is none."""
        best, count = None, 0
        for entry in self._entries:
            if entry.kind == kind and (common := min(limit, entry.common(ids))) > count:
                best, count = entry, common
        if best is None:
            return None
        self._entries = [*(entry for entry in self._entries if entry is not best), best]
        return KeptRows(best.buffers, count)

    def keep(self, ids: Ids, row_bytes: int, copy: Callable[[int], KVBuffers], kind: bool = False) -> None:
        """Keep the beginning of a prompt, or as much of it as half of the budget holds, so that there is room for others.

        Args:
            ids: the tokens whose rows are exact.
            row_bytes: bytes of one token's rows, over all layers.
            copy: `copy(count)` makes buffers of the first `count` rows.
            kind: see the class.
        """
        count = min(len(ids), self._budget // 2 // row_bytes)
        ids = ids[:count]
        common = [entry.common(ids) if entry.kind == kind else 0 for entry in self._entries]
        new = count - max(common, default=0)
        # Kept beginnings that are also beginnings of this one are dropped: this one contains them.
        left = [e for e, same in zip(self._entries, common, strict=True) if e.kind != kind or same < len(e.ids)]
        if new <= 0 or (new < min(WORTH, count // 4) and len(left) == len(self._entries)):
            return
        self._entries = [*left, _Entry(ids.copy(), kind, copy(count))]
        sizes = [entry.buffers.row_bytes * len(entry.ids) for entry in self._entries]
        gone = max(0, len(sizes) - MOST)
        while sum(sizes[gone:]) > self._budget:
            gone += 1
        del self._entries[:gone]
