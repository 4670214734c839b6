"""What a tier is: a place that holds whole chunks within a byte budget."""

from __future__ import annotations

import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

from ..chunk import Chunk, ChunkHead
from ..errors import StoreError
from ..keys import ChunkKey
from ..readers import ChunkReader
from ..stats import Counters, TierStats
from ..tier_kinds import TierKind

__all__ = ["LastingTier", "Pin", "Pins", "Tier"]

_FEW = 64


class Pin:
    """A chunk is in use as long as this object lives."""

    __slots__ = ("__weakref__", "digest")

    def __init__(self, digest: str) -> None:
        self.digest = digest


class Pins:
    """Chunks in use by this process. No tier evicts one of them.

    A use ends when its pin is freed, for whatever reason. A count that is raised and lowered would stay wrong for ever if Ctrl-C came in
    between.
    """

    def __init__(self) -> None:
        self._uses: dict[str, list[weakref.ref[Pin]]] = {}
        self._many = _FEW
        self._lock = threading.Lock()

    def add(self, key: ChunkKey) -> Pin:
        """Pin a chunk, for as long as the caller keeps the result."""
        pin = Pin(key.digest)
        with self._lock:
            live = [use for use in self._uses.get(key.digest, ()) if use() is not None]
            self._uses[key.digest] = [*live, weakref.ref(pin)]
            if len(self._uses) > self._many:
                self._sweep()
                self._many = 2 * len(self._uses) + _FEW
        return pin

    def __contains__(self, key: object) -> bool:
        digest = key.digest if isinstance(key, ChunkKey) else key
        return any(use() is not None for use in self._uses.get(digest, ()))  # type: ignore[call-overload]

    def __len__(self) -> int:
        with self._lock:
            self._sweep()
            return len(self._uses)

    def _sweep(self) -> None:
        self._uses = {digest: uses for digest, uses in self._uses.items() if any(use() is not None for use in uses)}


class Tier(ABC):
    """A place for chunks. What is true of it for all who use it, its `kind` says.

    Tiers are ordered by the store, fast ones first. A tier evicts its least recently used chunks to stay within its
    budget, never one that is pinned. All methods may be called from several threads.
    """

    kind: ClassVar[TierKind]
    budget: int
    counters: Counters

    @property
    def name(self) -> str:
        """The name of its kind."""
        return self.kind.name

    @abstractmethod
    def contains(self, key: ChunkKey) -> bool:
        """Whether the chunk is here. Nothing is read."""

    @abstractmethod
    def size_of(self, key: ChunkKey) -> int:
        """Bytes that a chunk takes here; 0 if it isn't here."""

    @abstractmethod
    def open(self, key: ChunkKey, errors: list[StoreError] | None = None) -> ChunkReader | None:
        """A reader of the chunk, or None. The chunk counts as used now.

        If the chunk is here and can't be used, the reason is added to `errors`.
        """

    def known_head(self, key: ChunkKey) -> ChunkHead | None:
        """The head of a chunk that is here as far as is known without waiting for anything; None where that isn't known. Nothing is counted."""
        return None

    @abstractmethod
    def heads(self) -> Iterator[tuple[ChunkKey, ChunkHead | Exception]]:
        """The head of every chunk that is here, or why it can't be read. Chunks that are removed meanwhile are left out."""

    @abstractmethod
    def touch(self, key: ChunkKey) -> None:
        """Count the chunk as used now, if it is here."""

    def fits(self, size: int) -> bool:
        """Whether a chunk of `size` bytes fits into the budget."""
        return size <= self.budget

    @abstractmethod
    def admit(self, chunk: Chunk) -> list[Chunk]:
        """Take a chunk in. Returns evicted chunks that the tier below could still keep.

        Raises:
            BudgetError: it doesn't fit, alone or beside the pinned chunks; nothing has changed.
            StorePathError: it can't be written.
        """

    @abstractmethod
    def remove(self, key: ChunkKey) -> int:
        """Delete a chunk, pinned or not. Open readers keep working. Returns the bytes that were freed."""

    @abstractmethod
    def stats(self) -> TierStats:
        """What the tier holds now, and what it did."""

    @abstractmethod
    def close(self) -> None:
        """Release what the tier holds in this process."""


class LastingTier(Tier):
    """A tier whose chunks are still there after the process has ended, and that keeps their texts in the index."""

    @abstractmethod
    def holds(self, key: ChunkKey, *, with_text: bool) -> bool:
        """Whether the chunk is here, sound as far as can be told quickly, and stored with a text if that is wanted. Nothing is counted."""

    def offer(self, key: ChunkKey) -> None:
        """A faster tier that lasts has the chunk. It is taken over from there, soon, unless it is here."""

    @abstractmethod
    def set_aside(self, key: ChunkKey) -> bool:
        """If the chunk is damaged here, take it out of the tier and count it. Returns whether it was damaged."""

    @abstractmethod
    def flush(self) -> None:
        """Write what was collected in memory, such as uses, to the index."""
