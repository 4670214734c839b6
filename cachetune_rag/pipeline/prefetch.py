"""Reads from disk into host memory behind the requests: ahead of the one that comes next, and what one left unread.

Nothing here decides an answer. A read that fails, or finds no room, is dropped: the request that needs the chunk opens it
itself, and handles damage as it always does.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError
from dataclasses import dataclass

from cachetune_rag.workers import Job, Workers
from cachetune_store import ChunkKey, ChunkReader, ChunkStore, DamagedChunkError, StoreError

_log = logging.getLogger(__name__)

AHEAD_THREADS = 8
"""For a request to come, begun when the disk is free: as many as a request itself reads with."""
REST_THREADS = 2
"""For what requests left: one chunk is checked while the next is on its way; more would only take the disk from requests."""


class Prefetch:
    """The chunks of one prompt on their way into host memory.

    It ends by itself: when they are there, when there is no more room, or when a request begins that needs them.
    """

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.futures: list[Job[int]] = []
        """The search for its chunks, and then one a chunk: the first ends when all others are there."""

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it has ended, at most `timeout` seconds; whether it has."""
        end = None if timeout is None else time.monotonic() + timeout
        # Not all are there yet while the first one runs.
        for future in self.futures:
            try:
                future.exception(None if end is None else max(0.0, end - time.monotonic()))
            except TimeoutError:
                return False
            except CancelledError:
                pass
        return True

    def cancel(self) -> None:
        """Read nothing more; what is half read is dropped."""
        self.stop.set()
        for future in list(self.futures):
            future.cancel()

    @property
    def bytes(self) -> int:
        """Bytes of host memory that were filled so far."""
        done = [f for f in list(self.futures) if f.done() and not f.cancelled()]
        return sum(f.result() for f in done if f.exception() is None)


@dataclass(eq=False)
class _Job:
    """One chunk that is, or will be, read; the job closes its reader.

    Attributes:
        ahead: for a request to come, which may as well read it itself; else it is what a request left.
        taken: the work is done elsewhere, though the future was cancelled.
    """

    work: Callable[[], int]
    reader: ChunkReader
    ahead: bool
    future: Job[int]
    taken: bool = False


class Prefetcher:
    """The threads that read, and what they are at. Safe to use from several threads.

    Args:
        store: where chunks come from and whose host tier they go to.
        limit: most bytes of host memory that one prompt may fill; never more than the host tier's budget.
    """

    def __init__(self, store: ChunkStore, limit: int | None = None):
        self._store = store
        budget = store.host_budget or store.device_budget  # without host memory chunks go straight to the device
        self._limit = budget if limit is None else min(limit, budget)
        self._pool = Workers(AHEAD_THREADS, "cachetune-prefetch")
        self._rest = Workers(REST_THREADS, "cachetune-prefetch-rest")
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._jobs: dict[ChunkKey, _Job] = {}
        self._left = 0  # bytes of readers that were taken over and aren't done

    def fetch(self, keys: Callable[[], Iterable[ChunkKey]]) -> Prefetch:
        """Have chunks read that are on disk and not in host memory, in this order, as far as they fit.

        `keys()` is called on one of the threads here: tokenising a long prompt is not for the one that computes.
        """
        prefetch, room = Prefetch(), _Room(self._limit)

        def begin() -> int:
            # Opened here, one after another, so that room goes to the first ones.
            for key in dict.fromkeys(keys()):
                if not room.left or prefetch.stop.is_set() or self._stop.is_set():
                    break
                future = self._open(key, prefetch.stop, room)
                if future is not None:
                    prefetch.futures.append(future)
            return 0

        # Nothing to do without room; and nothing can be begun any more when the engine is closed.
        with contextlib.suppress(RuntimeError):
            if self._limit:
                prefetch.futures.append(self._pool.submit(begin))
        return prefetch

    def finish(self, reader: ChunkReader) -> None:
        """Take over an open reader: read what is left of the chunk, put it into host memory, close the reader.

        Where requests leave more than the threads can finish, the reader is only closed.
        """
        with self._lock:
            self._left += reader.host_bytes
            busy = self._left > self._limit

        def work() -> int:
            try:
                return reader.host_bytes if self._read(reader, self._stop) else 0
            except DamagedChunkError:
                self._store.discard(reader.key)
                return 0
            except (StoreError, OSError) as error:
                _log.debug("chunk %s was not brought into host memory: %s", reader.key, error)
                return 0
            finally:
                self._release(reader, ahead=False)

        if busy or self._submit(work, reader, ahead=False) is None:
            self._release(reader, ahead=False)

    def settle(self, keys: Iterable[ChunkKey]) -> None:
        """A request begins that needs these chunks: no thread is reading any of them when this returns.

        Reads ahead that haven't begun are dropped, as the request itself reads no more than it needs. What an earlier request
        left is finished, so that every chunk of a request is in host memory for the next one.
        """
        with self._lock:
            jobs = [self._jobs[key] for key in keys if key in self._jobs]
        for job in jobs:
            job.taken = not job.ahead
            if not job.future.cancel():
                job.future.wait()
            elif job.taken:
                job.work()

    def close(self) -> None:
        """Stop; when this returns, nothing is read any more."""
        self._stop.set()
        for pool in (self._pool, self._rest):
            pool.shutdown(wait=True, cancel_futures=True)

    def _submit(self, work: Callable[[], int], reader: ChunkReader, *, ahead: bool) -> Job[int] | None:
        """None if the chunk is being read already, or nothing is read any more: the reader stays the caller's then."""
        key = reader.key
        with self._lock:
            if key in self._jobs or self._stop.is_set():
                return None
            try:
                pool = self._pool if ahead else self._rest
                job = self._jobs[key] = _Job(work, reader, ahead, pool.submit(work))
            except RuntimeError:  # closed meanwhile
                return None
        job.future.add_done_callback(lambda _: self._ended(key, job))
        return job.future

    def _ended(self, key: ChunkKey, job: _Job) -> None:
        with self._lock:
            self._jobs.pop(key, None)
        if job.future.cancelled() and not job.taken:
            self._release(job.reader, ahead=job.ahead)

    def _open(self, key: ChunkKey, stop: threading.Event, room: _Room) -> Job[int] | None:
        """Have a chunk read whole, if it is on disk and there is room; the future gives the bytes that it fills."""
        try:
            if there := self._store.touch_host(key):
                room.take(there)
                return None
            reader = self._store.open(key)
        except (StoreError, OSError) as error:
            _log.debug("chunk %s was not read ahead: %s", key, error)
            return None
        if reader is None:
            return None

        def work() -> int:
            try:
                if self._read(reader, stop):
                    return reader.host_bytes
                room.left = 0  # all there is in use: what comes next won't fit either
            except (StoreError, OSError) as error:
                # Damage too: the request finds it again, and its report then tells.
                _log.debug("chunk %s was not read ahead: %s", key, error)
            finally:
                reader.close()
            return 0

        future = self._submit(work, reader, ahead=True) if room.take(reader.host_bytes) else None
        if future is None:
            reader.close()
        return future

    def _read(self, reader: ChunkReader, stop: threading.Event) -> bool:
        """Read all rows, layer by layer, so that it can be stopped in between; whether the chunk is in host memory then."""
        for layer in range(len(reader.layout.layers)):
            if stop.is_set() or self._stop.is_set():
                return False
            reader.read(layer, reader.layout.tokens)
        return reader.promote()

    def _release(self, reader: ChunkReader, *, ahead: bool) -> None:
        if not ahead:
            with self._lock:
                self._left -= reader.host_bytes
        reader.close()


class _Room:
    """Bytes that one prompt may still fill. Once a chunk doesn't fit, none does: those before it were wanted sooner."""

    def __init__(self, limit: int):
        self.left = limit
        self._lock = threading.Lock()

    def take(self, size: int) -> bool:
        """Reserve room for a chunk."""
        with self._lock:
            fits = size <= self.left
            self.left = self.left - size if fits else 0
            return fits
