"""Chunks in memory of one kind, least recently used first out: what the host and the device tier have in common."""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import asdict
from typing import Generic, TypeVar

from ..chunk import ChunkHead
from ..errors import BudgetError
from ..keys import ChunkKey
from ..readers import ChunkReader
from ..stats import Counters, TierStats
from ..units import format_bytes
from .base import Pins, Tier

__all__ = ["MemoryTier"]

Held = TypeVar("Held")


class MemoryTier(Tier, Generic[Held]):
    """Whole chunks in memory.

    Args:
        budget: bytes of rows, counted as the allocator takes them; 0 turns the tier off.
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
        """A reader of a chunk that is here."""

    @abstractmethod
    def _head(self, held: Held) -> ChunkHead:
        """Its head."""

    def contains(self, key: ChunkKey) -> bool:
        """See Tier."""
        return key.digest in self._held

    def open(self, key: ChunkKey) -> ChunkReader | None:
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

    def heads(self) -> Iterator[ChunkHead]:
        """Heads of the chunks that are here."""
        with self._lock:
            held = list(self._held.values())
        return (self._head(chunk) for chunk, _ in held)

    def fits(self, size: int) -> bool:
        """Whether a chunk of `size` bytes could be held at all."""
        return size <= self.budget

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
        """Bytes taken. Under the lock."""
        return self._bytes

    def _make_room(self, size: int, key: ChunkKey) -> list[Held]:
        """Evict until `size` bytes fit in place of what `key` has now; what had to leave. Under the lock.

        Raises:
            BudgetError: they don't, alone or beside the chunks in use; nothing has changed.
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
        """Enter a chunk that there is room for, in place of what `key` has now. Under the lock."""
        self._bytes += size - self.size_of(key)
        self._held[key.digest] = chunk, size
        self._held.move_to_end(key.digest)
