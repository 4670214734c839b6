"""Chunks in host memory, pinned where a GPU will fetch them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import asdict

from ..chunk import Chunk, ChunkHead
from ..errors import BudgetError
from ..keys import ChunkKey
from ..readers import HostReader
from ..stats import Counters, TierStats
from ..units import format_bytes
from .base import Pins, Tier

__all__ = ["HostTier"]


class HostTier(Tier):
    """Whole chunks in memory, least recently used first out.

    Args:
        budget: bytes of rows, counted as the allocator takes them; 0 turns the tier off.
        pins: chunks in use.
    """

    name = "host"

    def __init__(self, budget: int, pins: Pins) -> None:
        self.budget = budget
        self.counters = Counters()
        self._pins = pins
        self._chunks: OrderedDict[str, Chunk] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def contains(self, key: ChunkKey) -> bool:
        """See Tier."""
        return key.digest in self._chunks

    def open(self, key: ChunkKey) -> HostReader | None:
        """See Tier."""
        with self._lock:
            chunk = self._chunks.get(key.digest)
            if chunk is None:
                self.counters.misses += 1
                return None
            self._chunks.move_to_end(key.digest)
            self._pins.add(key)
            self.counters.hits += 1
        return HostReader(chunk)

    def touch(self, key: ChunkKey) -> None:
        """See Tier."""
        with self._lock:
            if key.digest in self._chunks:
                self._chunks.move_to_end(key.digest)

    def fits(self, size: int) -> bool:
        """Whether a chunk of `size` bytes could be held at all."""
        return size <= self.budget

    def admit(self, chunk: Chunk) -> list[Chunk]:
        """See Tier."""
        digest, size = chunk.key.digest, chunk.host_bytes
        if not self.fits(size):
            raise BudgetError(
                f"chunk {digest} takes {format_bytes(size)} of host memory, more than host_budget "
                f"({format_bytes(self.budget)}); raise the budget or store shorter chunks"
            )
        with self._lock:
            old = self._chunks.get(digest)
            victims = self._victims(size - (old.host_bytes if old else 0), digest)
            for victim in victims:
                del self._chunks[victim.key.digest]
                self._bytes -= victim.host_bytes
                self.counters.evictions += 1
            if old is not None:
                self._bytes -= old.host_bytes
            self._chunks[digest] = chunk
            self._chunks.move_to_end(digest)
            self._bytes += size
        return victims

    def remove(self, key: ChunkKey) -> int:
        """See Tier."""
        with self._lock:
            chunk = self._chunks.pop(key.digest, None)
            if chunk is None:
                return 0
            self._bytes -= chunk.host_bytes
            return chunk.host_bytes

    def size_of(self, key: ChunkKey) -> int:
        """Bytes that a chunk takes here; 0 if it isn't here."""
        chunk = self._chunks.get(key.digest)
        return chunk.host_bytes if chunk else 0

    def heads(self) -> list[ChunkHead]:
        """Heads of the chunks held now."""
        with self._lock:
            return [chunk.head for chunk in self._chunks.values()]

    def stats(self) -> TierStats:
        """See Tier."""
        with self._lock:
            pinned = sum(1 for digest in self._chunks if digest in self._pins)
            return TierStats(self.name, len(self._chunks), self._bytes, self.budget, pinned, **asdict(self.counters))

    def close(self) -> None:
        """See Tier."""
        with self._lock:
            self._chunks.clear()
            self._bytes = 0

    def _victims(self, more: int, keep: str) -> list[Chunk]:
        """The least recently used chunks that make room for `more` bytes."""
        short = self._bytes + more - self.budget
        victims: list[Chunk] = []
        for digest, chunk in self._chunks.items():
            if short <= 0:
                break
            if digest != keep and digest not in self._pins:
                victims.append(chunk)
                short -= chunk.host_bytes
        if short > 0:
            raise BudgetError(
                f"host tier: {format_bytes(short)} too little beside the chunks in use (host_budget "
                f"{format_bytes(self.budget)}); close readers first or raise the budget"
            )
        return victims
