"""Finds the least recently used chunks without sorting the whole index at every eviction."""

from __future__ import annotations

import heapq
import threading
import time
from collections.abc import Callable

from ..index import Index

__all__ = ["LruOrder"]

_RELOAD_SECONDS = 60.0


class LruOrder:
    """A heap of (last use, digest). An entry is compared with the index when it comes to the top.

    Chunks of other processes are read from the index when the heap is empty, or after a minute. The record "total" counts all chunks that
    were ever stored. If this process has stored all of them, nothing has to be read.
    """

    def __init__(self, index: Index) -> None:
        self._index = index
        self._heap: list[tuple[float, str]] = []
        self._loaded = float("-inf")
        self._known = 0
        self._lock = threading.RLock()

    def add(self, used: float, digest: str) -> None:
        """Add a chunk that was stored."""
        with self._lock:
            heapq.heappush(self._heap, (used, digest))
            self._known += 1

    def victims(self, short: int, spared: Callable[[str], bool]) -> list[str] | None:
        """Digests of the least recently used chunks that together free `short` bytes; None if all that may be evicted are too few."""
        with self._lock:
            if time.monotonic() - self._loaded > _RELOAD_SECONDS and self._stored() != self._known:
                self._load()
            found = self._collect(short, spared)
            if found is None:
                self._load()
                found = self._collect(short, spared)
            return found

    def _stored(self) -> int:
        return int((self._index.get("total") or {}).get("stored", 0))

    def _load(self) -> None:
        self._known = self._stored()
        self._heap = [(record["used"], name.removeprefix("chunk/")) for name, record in self._index.items("chunk/")]
        heapq.heapify(self._heap)
        self._loaded = time.monotonic()

    def _collect(self, short: int, spared: Callable[[str], bool]) -> list[str] | None:
        victims: dict[str, float] = {}
        kept: dict[str, float] = {}
        while short > 0 and self._heap:
            used, digest = heapq.heappop(self._heap)
            record = self._index.get(f"chunk/{digest}")
            if record is None or digest in victims or digest in kept:
                continue
            if record["used"] > used:
                heapq.heappush(self._heap, (record["used"], digest))
            elif spared(digest):
                kept[digest] = used
            else:
                victims[digest] = used
                short -= record["size"]
        back = kept if short <= 0 else kept | victims
        for digest, used in back.items():
            heapq.heappush(self._heap, (used, digest))
        return list(victims) if short <= 0 else None
