"""Chunks in one kind of memory: what the host tier and the device tier have in common."""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import asdict
from typing import Generic, TypeVar

from ..chunk import ChunkHead
from ..errors import BudgetError, StoreError
from ..keys import ChunkKey
from ..readers import ChunkReader
from ..stats import Counters, TierStats
from ..units import format_bytes
from .base import Pins, Tier

__all__ = ["MemoryTier"]

Held = TypeVar("Held")


class MemoryTier(Tier, Generic[Held]):
    """Whole chunks in memory. The least recently used chunk is evicted first.

    Args:
        budget: bytes that chunks may take, as the allocator rounds them; 0 turns the tier off.
        pins: chunks in use.
    """

    def __init__(self, budget: int, pins: Pins) -> None:
        self.budget = budget
        self.counters = Counters()
        self._pins = pins
        self._held: OrderedDict[str, tuple[Held, int]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    @abstractmethod
    def _reader(self, held: Held) -> ChunkReader:
        """A reader of a held chunk."""

    @abstractmethod
    def _head(self, held: Held) -> ChunkHead:
        """The head of a held chunk."""

    def contains(self, key: ChunkKey) -> bool:
        """See Tier."""
        return key.digest in self._held

    def open(self, key: ChunkKey, errors: list[StoreError] | None = None) -> ChunkReader | None:
        """See Tier."""
        with self._lock:
            entry = self._held.get(key.digest)
            if entry is None:
                self.counters.misses += 1
                return None
            self._held.move_to_end(key.digest)
            pin = self._pins.add(key)
            self.counters.hits += 1
        reader = self._reader(entry[0])
        reader.pin = pin
        return reader

    def touch(self, key: ChunkKey) -> None:
        """See Tier."""
        with self._lock:
            if key.digest in self._held:
                self._held.move_to_end(key.digest)

    def known_head(self, key: ChunkKey) -> ChunkHead | None:
        """See Tier."""
        entry = self._held.get(key.digest)
        return self._head(entry[0]) if entry else None

    def heads(self) -> Iterator[tuple[ChunkKey, ChunkHead | Exception]]:
        """See Tier."""
        with self._lock:
            heads = [self._head(chunk) for chunk, _ in self._held.values()]
        return ((head.key, head) for head in heads)

    def remove(self, key: ChunkKey) -> int:
        """See Tier."""
        with self._lock:
            _, size = self._held.pop(key.digest, (None, 0))
            self._bytes -= size
            return size

    def size_of(self, key: ChunkKey) -> int:
        """See Tier."""
        entry = self._held.get(key.digest)
        return entry[1] if entry else 0

    def stats(self) -> TierStats:
        """See Tier."""
        with self._lock:
            pinned = sum(1 for digest in self._held if digest in self._pins)
            return TierStats(self.name, len(self._held), self._used(), self.budget, pinned, **asdict(self.counters))

    def close(self) -> None:
        """See Tier."""
        with self._lock:
            self._held.clear()
            self._bytes = 0

    def _used(self) -> int:
        """Bytes that are taken now. Called with the lock held."""
        return self._bytes

    def _make_room(self, size: int, key: ChunkKey) -> list[Held]:
        """Evict chunks until `size` bytes fit in place of the present chunk of `key`. Returns them. Called with the lock held.

        Raises:
            BudgetError: they don't fit, alone or beside the chunks in use. Nothing has changed.
        """
        if not self.fits(size):
            raise BudgetError(
                f"chunk {key} takes {format_bytes(size)} of {self.name} memory, more than {self.name}_budget "
                f"({format_bytes(self.budget)}); raise the budget or store shorter chunks"
            )
        short = self._used() + size - self.size_of(key) - self.budget
        victims: list[str] = []
        for digest, (_, held) in self._held.items():
            if short <= 0:
                break
            if digest != key.digest and digest not in self._pins:
                victims.append(digest)
                short -= held
        if short > 0:
            raise BudgetError(
                f"{self.name} tier: {format_bytes(short)} too little beside the chunks in use ({self.name}_budget "
                f"{format_bytes(self.budget)}); close readers first or raise the budget"
            )
        gone = [self._held.pop(digest) for digest in victims]
        self._bytes -= sum(held for _, held in gone)
        self.counters.evictions += len(gone)
        return [chunk for chunk, _ in gone]

    def _hold(self, key: ChunkKey, chunk: Held, size: int) -> None:
        """Hold a chunk, in place of the present one of `key`. There is room for it. Called with the lock held."""
        self._bytes += size - self.size_of(key)
        self._held[key.digest] = chunk, size
        self._held.move_to_end(key.digest)
