"""What a tier is: a place that holds whole chunks within a byte budget."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import Counter

from ..chunk import Chunk
from ..keys import ChunkKey
from ..readers import ChunkReader
from ..stats import Counters, TierStats

__all__ = ["Pins", "Tier"]


class Pins:
    """Chunks in use by this process, counted. No tier evicts one of them."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def add(self, key: ChunkKey) -> None:
        """One more user of a chunk."""
        with self._lock:
            self._counts[key.digest] += 1

    def drop(self, key: ChunkKey) -> None:
        """One user less."""
        with self._lock:
            self._counts[key.digest] -= 1
            if self._counts[key.digest] <= 0:
                del self._counts[key.digest]

    def __contains__(self, key: object) -> bool:
        return (key.digest if isinstance(key, ChunkKey) else key) in self._counts

    def __len__(self) -> int:
        return len(self._counts)


class Tier(ABC):
    """A place for chunks: device, host and disk here; a remote store fits the same shape.

    Tiers are ordered by the store, fast ones first. A tier evicts its least recently used chunks to stay within its
    budget, never one that is pinned. All methods may be called from several threads.
    """

    name: str
    budget: int
    counters: Counters

    @abstractmethod
    def contains(self, key: ChunkKey) -> bool:
        """Whether the chunk is here; nothing is read."""

    @abstractmethod
    def open(self, key: ChunkKey) -> ChunkReader | None:
        """A reader of the chunk, or None. Counts as a use."""

    @abstractmethod
    def touch(self, key: ChunkKey) -> None:
        """Note a use of the chunk, if it is here."""

    @abstractmethod
    def admit(self, chunk: Chunk) -> list[Chunk]:
        """Take a chunk in; chunks that had to leave and could still be kept by the tier below.

        Raises:
            BudgetError: it doesn't fit, alone or beside the pinned chunks; nothing has changed.
            StorePathError: it can't be written.
        """

    @abstractmethod
    def remove(self, key: ChunkKey) -> int:
        """Delete a chunk, pinned or not (open readers keep working); bytes freed."""

    @abstractmethod
    def stats(self) -> TierStats:
        """What the tier holds and did."""

    @abstractmethod
    def close(self) -> None:
        """Release what the tier holds in this process."""
