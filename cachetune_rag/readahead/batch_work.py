"""The threads that do the work of batches (`batch.py`), at once or later.

What a batch's work is, is not known here: opening chunks, giving them room and reading them is the business of `coming.py`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from cachetune_rag.concurrency.workers import Workers
from cachetune_rag.readahead.batch import Batch

THREADS = 4
"""Enough to keep a disk busy. More would take the interpreter from the request that is being served more often."""

_log = logging.getLogger(__name__)


class BatchWork:
    """Runs work of batches on `THREADS` threads. Safe to use from several threads. It raises nothing.

    If `close` comes before a thread gets to a piece of work, that is dropped. Its caller is told, so that the batch lets go of what it holds.
    """

    def __init__(self) -> None:
        self._pool = Workers(THREADS, "cachetune-prefetch")
        self._stop = threading.Event()
        # Guards `_timers`, and of each call of `together` how many threads are left. No work is called while it is held, and what batches
        # and their chunks have is guarded by the lock of those who hand work over.
        self._lock = threading.Lock()
        # Batches of which nothing is to be done yet, and what is called if that stays so.
        self._timers: dict[Batch, tuple[threading.Timer, Callable[[], None]]] = {}

    @property
    def closing(self) -> bool:
        """Whether `close` was called."""
        return self._stop.is_set()

    def begin(self, batch: Batch, work: Callable[[], object], drop: Callable[[], None]) -> None:
        """Let a thread do `work`. `drop` is called instead where the engine is closed before a thread gets to it."""

        def run() -> int:
            work()
            return 0

        self._submit(batch, run, drop)

    def begin_later(self, batch: Batch, after: float, work: Callable[[], object], drop: Callable[[], None]) -> bool:
        """As `begin`, so many seconds from now. Returns whether the batch waits for that now; if not, `drop` was called."""
        timer = threading.Timer(after, self._due, (batch, work))
        timer.daemon = True
        with self._lock:
            started = not self.closing
            if started:
                self._timers[batch] = timer, drop
                try:
                    timer.start()
                except RuntimeError as error:  # the system gives no more threads
                    _log.debug("chunks are not read on: %s", error)
                    del self._timers[batch]
                    started = False
        if not started:
            drop()
        return started

    def together(self, batch: Batch, count: int, work: Callable[[Batch], int], then: Callable[[], None]) -> None:
        """Do `work(batch)` on several threads, at most `count`. The last one that ends or is cancelled calls `then`.

        Args:
            work: gives the bytes of host memory that it filled.
        """
        left = min(THREADS, count)
        if not left:
            then()
            return

        def ended() -> None:
            nonlocal left
            with self._lock:
                left -= 1
                last = not left
            if last:
                then()

        def run() -> int:
            try:
                return work(batch)
            finally:
                ended()

        for _ in range(left):
            self._submit(batch, run, ended)

    def close(self) -> None:
        """Drop what no thread has begun; when this returns, nothing is done any more. Work that is being done looks at `closing`."""
        self._stop.set()
        with self._lock:
            timers, self._timers = self._timers, {}
        for timer, drop in timers.values():
            timer.cancel()
            drop()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _submit(self, batch: Batch, run: Callable[[], int], drop: Callable[[], None]) -> None:
        """Hand `run` to a thread, which gives the bytes of host memory that it filled. `drop` is called instead if no thread gets to it."""
        try:
            job = self._pool.submit(run)
        except RuntimeError:  # closed already
            drop()
            return
        job.add_done_callback(lambda ended: drop() if ended.cancelled() else None)
        batch.prefetch.futures.append(job)

    def _due(self, batch: Batch, work: Callable[[], object]) -> None:
        with self._lock:
            mine = self._timers.pop(batch, None)
        if mine is not None:  # otherwise closed meanwhile
            _, drop = mine
            self.begin(batch, work, drop)
