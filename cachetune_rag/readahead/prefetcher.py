"""Reads from disk into host memory in the background: chunks of coming requests, and the rest of chunks that a request read in part.

Nothing here changes an answer. A read that fails or finds no room is dropped: the request that needs the chunk opens it itself, and
handles damage as it always does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from cachetune_rag.readahead.batch import Prefetch
from cachetune_rag.readahead.coming import ReadAhead
from cachetune_rag.readahead.leftovers import Leftovers
from cachetune_store import ChunkKey, ChunkReader, ChunkStore

_BREATH = 0.002
"""Polling interval while a request keeps the disk, seconds."""


class DiskPriority:
    """Makes background reads yield to one request.

    From `claim` to `release` nothing is read in the background, because the request waits for the disk. From `claim` to `end` the
    request's chunks are not read in the background: it reads them itself, and they are in host memory afterwards.

    Args:
        waiting: all priorities that were claimed and not released.
        opened: all priorities that were claimed and not ended.
        keys: chunks that the request has open.
    """

    def __init__(self, waiting: set[DiskPriority], opened: set[DiskPriority], keys: Iterable[ChunkKey]):
        self._waiting, self._opened, self.keys = waiting, opened, frozenset(keys)

    def claim(self) -> None:
        """Take effect. Separate from `__init__`, so that the call of `end` is registered before: Ctrl-C may come in between."""
        self._opened.add(self)
        self._waiting.add(self)

    def release(self) -> None:
        """The disk is free again. May be called more than once, on any thread."""
        self._waiting.discard(self)

    def end(self) -> None:
        """The request is done with its chunks."""
        self.release()
        self._opened.discard(self)


class Prefetcher:
    """All background reading. Safe to use from several threads.

    Args:
        store: where chunks come from and whose host tier they go to.
        limit: most bytes of host memory that one prompt may fill; never more than the host tier's budget.
    """

    def __init__(self, store: ChunkStore, limit: int | None = None):
        budget = store.host_budget or store.device_budget  # without host memory chunks go straight to the device
        limit = budget if limit is None else min(limit, budget)
        self._waiting: set[DiskPriority] = set()
        self._opened: set[DiskPriority] = set()
        self.leftovers = Leftovers(store, limit, self._wait)
        self._ahead = ReadAhead(store, limit, self._wait, self._elsewhere)

    def fetch(
        self, keys: Callable[[], Iterable[ChunkKey]], rows: Callable[[ChunkReader], int] | None = None
    ) -> Prefetch:
        """See `ReadAhead.fetch`."""
        return self._ahead.fetch(keys, rows)

    def go_on(
        self, readers: Sequence[ChunkReader], rows: Callable[[ChunkReader], int] | None = None, after: float = 0.0
    ) -> int:
        """See `ReadAhead.go_on`."""
        return self._ahead.go_on(readers, rows, after)

    def read_later(self, sizes: Mapping[ChunkKey, int], rows: Callable[[ChunkReader], int], after: float) -> int:
        """See `ReadAhead.read_later`."""
        return self._ahead.read_later(sizes, rows, after)

    def has_begun(self, key: ChunkKey) -> bool:
        """Whether some of a chunk was read in the background, for whatever reason, and is not in memory yet."""
        return self._ahead.has_begun(key) or self.leftovers.has(key)

    def finish(self, reader: ChunkReader) -> None:
        """See `Leftovers.finish`."""
        if self._ahead.has(reader.key):
            reader.close()
        else:
            self.leftovers.finish(reader)

    def take(self, keys: Iterable[ChunkKey]) -> dict[ChunkKey, ChunkReader]:
        """A request begins that needs these chunks: no thread is reading any of them when this returns.

        What an earlier request left unread is finished first, so that every chunk of a request is in host memory for the next one.
        Chunks that were being read ahead are handed to the request: their readers are open and hold what was read.
        """
        wanted = list(keys)
        self.leftovers.finish_for_request(wanted)
        return self._ahead.take(wanted)

    def priority(self, keys: Iterable[ChunkKey] = ()) -> DiskPriority:
        """For a request that waits for the disk. `keys` are the chunks that it has open."""
        return DiskPriority(self._waiting, self._opened, keys)

    def close(self) -> None:
        """Stop; when this returns, nothing is read any more."""
        self._ahead.close()
        self.leftovers.close()

    @property
    def paused(self) -> bool:
        """Whether a request waits for the disk, so that nothing is read here."""
        return bool(self._waiting)

    @property
    def coming(self) -> set[ChunkKey]:
        """Chunks that are being read for coming requests, or will be."""
        return self._ahead.keys

    def is_coming(self, key: ChunkKey) -> bool:
        """Whether a chunk is being read for a coming request."""
        return self._ahead.has(key)

    @property
    def closing(self) -> bool:
        """Whether reading was told to stop for good."""
        return self._ahead.closing

    def _wait(self, stopped: Callable[[], bool]) -> None:
        """Return once no request waits for the disk, or `stopped()`."""
        while self.paused and not stopped():
            time.sleep(_BREATH)

    def _elsewhere(self, key: ChunkKey) -> bool:
        return self.leftovers.has(key) or any(key in priority.keys for priority in list(self._opened))
