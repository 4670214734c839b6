"""Reads the rest of chunks that a request read in part, in the background, so that the next request finds them in host memory."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from cachetune_rag.concurrency.workers import Job, Workers
from cachetune_store import ChunkKey, ChunkReader, ChunkStore, DamagedChunkError, StoreError

THREADS = 2
"""One chunk is checked while the next is read; more threads would only take the disk from requests."""

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Job:
    """One chunk that is being read or waits for it. The job closes the reader.

    Attributes:
        taken: a request does the work itself; its future was cancelled for that.
    """

    work: Callable[[], None]
    reader: ChunkReader
    future: Job[None]
    taken: bool = False


class Leftovers:
    """The threads that read, and the chunks that they read. Safe to use from several threads.

    Args:
        store: where chunks come from and whose host tier they go to.
        limit: most bytes of host memory that waiting chunks may fill; chunks beyond that stay on disk.
        wait: `wait(stopped)` returns once something may be read, or `stopped()`.
    """

    def __init__(self, store: ChunkStore, limit: int, wait: Callable[[Callable[[], bool]], None]):
        self._store, self._limit, self._wait = store, limit, wait
        self._pool = Workers(THREADS, "cachetune-prefetch-rest")
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._jobs: dict[ChunkKey, _Job] = {}
        self._bytes = 0  # of readers that were taken over and are not done

    def finish(self, reader: ChunkReader) -> None:
        """Take over an open reader: read what is left of the chunk, put it into host memory, close the reader.

        Where requests leave more than the threads can finish, the reader is only closed.
        """
        reader.timed = False
        with self._lock:
            self._bytes += reader.host_bytes
            busy = self._bytes > self._limit
        if busy or not self._submit(lambda: self._read(reader), reader):
            self._release(reader)

    @property
    def waiting(self) -> int:
        """Bytes of the chunks that are being read or wait for it."""
        return self._bytes

    def finish_for_request(self, keys: Iterable[ChunkKey]) -> None:
        """A request begins that needs these chunks. When this returns, all that earlier requests left unread of them is read."""
        with self._lock:
            jobs = [self._jobs[key] for key in keys if key in self._jobs]
        for job in jobs:
            job.taken = True
            if job.future.cancel():
                job.work()
            else:
                job.future.wait()

    def has(self, key: ChunkKey) -> bool:
        """Whether a chunk is being read here."""
        return key in self._jobs

    def close(self) -> None:
        """Stop; when this returns, nothing is read any more."""
        self._stop.set()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _submit(self, work: Callable[[], None], reader: ChunkReader) -> bool:
        """Start reading. False if the chunk is being read already or reading has stopped: the caller keeps the reader then."""
        key = reader.key
        with self._lock:
            if key in self._jobs or self._stop.is_set():
                return False
            try:
                job = self._jobs[key] = _Job(work, reader, self._pool.submit(work))
            except RuntimeError:  # closed meanwhile
                return False
        job.future.add_done_callback(lambda _: self._ended(key, job))
        return True

    def _ended(self, key: ChunkKey, job: _Job) -> None:
        with self._lock:
            self._jobs.pop(key, None)
        if job.future.cancelled() and not job.taken:
            self._release(job.reader)

    def _read(self, reader: ChunkReader) -> None:
        """Read a chunk layer by layer, so that reading can stop in between."""
        try:
            for layer in range(len(reader.layout.layers)):
                self._wait(self._stop.is_set)
                if self._stop.is_set():
                    return
                reader.read(layer, reader.layout.tokens)
            reader.promote()
        except DamagedChunkError:
            self._store.discard(reader.key)
        except (StoreError, OSError) as error:
            _log.debug("chunk %s was not brought into host memory: %s", reader.key, error)
        finally:
            self._release(reader)

    def _release(self, reader: ChunkReader) -> None:
        with self._lock:
            self._bytes -= reader.host_bytes
        reader.close()
