"""The store's figures for `stats()`, also while its disk doesn't answer."""

from __future__ import annotations

import time
from contextlib import suppress

from cachetune_rag.concurrency.deadline import DeadlinePool, StoreTimeoutError
from cachetune_rag.concurrency.workers import Job
from cachetune_store import ChunkStore, StoreError, StoreStats

WAIT = 5.0
"""Seconds that the figures are waited for, at most: half of what Prometheus waits for all metrics together by default."""


class StoreFigures:
    """What the store tells of itself, which it looks up in its index on disk; the last known where the disk doesn't answer.

    Looking at figures must not change how requests are served. So a look that takes long is left behind without counting as
    overdue, which would send requests past the disk; until it has come back, no other is begun.

    Args:
        store: whose figures.
        pool: makes the calls.
    """

    def __init__(self, store: ChunkStore, pool: DeadlinePool):
        self._store, self._pool = store, pool
        self._last: tuple[StoreStats, float] | None = None
        self._left: Job[StoreStats] | None = None
        with suppress(StoreError):
            self.get()  # so that there are some later on

    def get(self) -> tuple[StoreStats, float]:
        """The figures, and how many seconds old they are: 0.0 if they were read now.

        Raises:
            StoreTimeoutError: the disk hasn't answered since the engine was made.
            StoreError: they can't be read.
        """
        seconds = self._pool.seconds
        if seconds is None:
            return self._store.stats(), 0.0
        if not self._pool.overdue and (self._left is None or self._left.done()):
            reading = self._pool.begin(self._store.stats)
            try:
                figures = reading.result(min(seconds, WAIT))
            except TimeoutError:
                if reading.done():
                    raise  # the store's own
                self._left = reading
            else:
                self._last = figures, time.monotonic()
                return figures, 0.0
        if self._last is None:
            raise StoreTimeoutError("the store's disk doesn't answer, and what it holds was never known")
        figures, since = self._last
        return figures, time.monotonic() - since
