"""Reads from disk into host memory behind the requests: ahead of the one that comes next, and what one left unread.

Nothing here decides an answer. A read that fails, or finds no room, is dropped: the request that needs the chunk opens it
itself, and handles damage as it always does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from cachetune_rag.readahead.coming import Prefetch, ReadAhead
from cachetune_rag.readahead.leftovers import Leftovers
from cachetune_store import ChunkKey, ChunkReader, ChunkStore

__all__ = ["Hold", "Prefetch", "Prefetcher"]

_BREATH = 0.002
"""Seconds between two looks at whether the disk is free."""


class Hold:
    """What a request at hand keeps from those who read behind requests.

    From `begin` to `release` nothing is read behind requests, for this one waits for the disk. From `begin` to `end` its chunks
    aren't read for others: they are in host memory behind it.

    Args:
        waiting, opened: all that were begun, and not released or not ended.
        keys: chunks that the request has open.
    """

    def __init__(self, waiting: set[Hold], opened: set[Hold], keys: Iterable[ChunkKey]):
        self._waiting, self._opened, self.keys = waiting, opened, frozenset(keys)

    def begin(self) -> None:
        """From now on. Apart from making it, so that whoever makes it can see to its end first: Ctrl-C may come in between."""
        self._opened.add(self)
        self._waiting.add(self)

    def release(self) -> None:
        """The disk is free. May be called again, on any thread."""
        self._waiting.discard(self)

    def end(self) -> None:
        """The request is done with its chunks."""
        self.release()
        self._opened.discard(self)


class Prefetcher:
    """All reading behind requests. Safe to use from several threads.

    Args:
        store: where chunks come from and whose host tier they go to.
        limit: most bytes of host memory that one prompt may fill; never more than the host tier's budget.
    """

    def __init__(self, store: ChunkStore, limit: int | None = None):
        budget = store.host_budget or store.device_budget  # without host memory chunks go straight to the device
        limit = budget if limit is None else min(limit, budget)
        self._waiting: set[Hold] = set()
        self._opened: set[Hold] = set()
        self._leftovers = Leftovers(store, limit, self._wait)
        self._ahead = ReadAhead(store, limit, self._wait, self._elsewhere)

    def fetch(
        self, keys: Callable[[], Iterable[ChunkKey]], rows: Callable[[ChunkReader], int] | None = None
    ) -> Prefetch:
        """See `ReadAhead.fetch`."""
        return self._ahead.fetch(keys, rows)

    def finish(self, reader: ChunkReader) -> None:
        """See `Leftovers.finish`."""
        if self._ahead.has(reader.key):
            reader.close()
        else:
            self._leftovers.finish(reader)

    def take(self, keys: Iterable[ChunkKey]) -> dict[ChunkKey, ChunkReader]:
        """A request begins that needs these chunks: no thread is reading any of them when this returns.

        What an earlier request left is finished, so that every chunk of a request is in host memory for the next one. What was
        being read ahead is the request's: open readers, which hold what was read.
        """
        wanted = list(keys)
        self._leftovers.settle(wanted)
        return self._ahead.take(wanted)

    def hold(self, keys: Iterable[ChunkKey] = ()) -> Hold:
        """For a request that waits for the disk, with the chunks that it has open."""
        return Hold(self._waiting, self._opened, keys)

    def close(self) -> None:
        """Stop; when this returns, nothing is read any more."""
        self._ahead.close()
        self._leftovers.close()

    def _paused(self) -> bool:
        return bool(self._waiting)

    def _wait(self, stopped: Callable[[], bool]) -> None:
        """Return once nobody waits for the disk, or `stopped()`."""
        while self._paused() and not stopped():
            time.sleep(_BREATH)

    def _elsewhere(self, key: ChunkKey) -> bool:
        return self._leftovers.has(key) or any(key in hold.keys for hold in list(self._opened))
