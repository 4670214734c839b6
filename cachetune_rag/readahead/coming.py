"""Reading the chunks of coming requests, layer by layer, until the request takes them over.

A request needs the first layer of every chunk before the second of any. So that is the order of reading, and what was read when
the request comes is read: it is given the open chunks and goes on where this stopped.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass
from functools import partial

from cachetune_rag.checking.arguments import check_wait
from cachetune_rag.concurrency.forks import this_process
from cachetune_rag.concurrency.workers import Job, Workers
from cachetune_store import ChunkKey, ChunkReader, ChunkStore, StoreError

THREADS = 4
"""Enough to keep a disk busy. Each of them takes the interpreter from the request at hand now and then, whose answer gets slower."""
OPENERS = 2
"""Threads that open chunks: what that takes is the interpreter, which the request at hand needs more, and there is time."""
_BREATH = 0.0005
"""Seconds between two looks at whether a read is over, of one who can't do anything but wait."""

_log = logging.getLogger(__name__)


class Prefetch:
    """The chunks of one prompt on their way into host memory.

    It ends by itself: when they are there, when there is no more room, or when a request begins that needs them.
    """

    def __init__(self) -> None:
        self._origin = this_process()
        self.stop = threading.Event()
        self.futures: list[Job[int]] = []
        """What is done for it; each is added before the one that led to it has ended."""

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it has ended, at most `timeout` seconds; whether it has."""
        check_wait(timeout)
        end = None if timeout is None else time.monotonic() + timeout
        # More may be added meanwhile.
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
        if not self._origin.here:
            return
        self.stop.set()
        for future in list(self.futures):
            future.cancel()

    @property
    def bytes(self) -> int:
        """Bytes of host memory that were filled so far."""
        done = [f for f in list(self.futures) if f.done() and not f.cancelled()]
        return sum(f.result() for f in done if f.exception() is None)


@dataclass(eq=False)
class _Chunk:
    """A chunk that is being read.

    Attributes:
        reader: open; whoever makes it `gone` closes it, or hands it on.
        rows: how many rows of each layer are wanted first.
        left: reads to come.
        reading: reads under way.
        failed: a read went wrong.
        gone: a request has it, or it is closed.
    """

    reader: ChunkReader
    rows: int
    left: int
    reading: int = 0
    failed: bool = False
    gone: bool = False


class _Batch:
    """The chunks of one prefetch."""

    def __init__(self, limit: int):
        self.prefetch, self.room = Prefetch(), limit
        self.keys: Iterator[tuple[int, ChunkKey]] = iter(())
        self.found: dict[int, int | ChunkReader] = {}  # what is in host memory already, by its size, or an open chunk
        self.chunks: list[_Chunk] = []
        self.order: Iterator[tuple[_Chunk, int, int]] = iter(())

    def take_room(self, size: int) -> bool:
        """Reserve room for a chunk. Once one doesn't fit, none does: those before it were wanted sooner."""
        fits = size <= self.room
        self.room = self.room - size if fits else 0
        return fits

    def reads(self) -> Iterator[tuple[_Chunk, int, int]]:
        """Chunk, layer and rows of every read: first what is wanted first of all layers, then the rest."""
        layers = max((len(c.reader.layout.layers) for c in self.chunks), default=0)
        for whole in (False, True):
            for layer in range(layers):
                for chunk in self.chunks:
                    tokens = chunk.reader.layout.tokens
                    if not whole or chunk.rows < tokens:
                        yield chunk, layer, tokens if whole else chunk.rows


class ReadAhead:
    """The threads that read for coming requests. Safe to use from several threads. It raises nothing.

    Args:
        store: where chunks come from and whose host tier they go to.
        limit: most bytes of host memory that one prompt may fill.
        wait: `wait(stopped)` returns once something may be read, or `stopped()`.
        elsewhere: whether a chunk is being read for another reason.
    """

    def __init__(
        self,
        store: ChunkStore,
        limit: int,
        wait: Callable[[Callable[[], bool]], None],
        elsewhere: Callable[[ChunkKey], bool],
    ):
        self._store, self._limit, self._wait, self._elsewhere = store, limit, wait, elsewhere
        self._pool = Workers(THREADS, "cachetune-prefetch")
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._chunks: dict[ChunkKey, _Chunk] = {}

    def fetch(
        self, keys: Callable[[], Iterable[ChunkKey]], rows: Callable[[ChunkReader], int] | None = None
    ) -> Prefetch:
        """Have chunks read that are on disk and not in host memory, as far as they fit, the first ones first.

        Args:
            keys: called on one of the threads here: tokenising a long prompt is not for the one that computes.
            rows: how many rows of each layer of an open chunk the request will need; None: all. The others are read afterwards.
        """
        batch = _Batch(self._limit)
        count = rows or (lambda reader: reader.layout.tokens)

        def begin() -> int:
            wanted = list(dict.fromkeys(keys()))
            batch.keys = enumerate(wanted)
            self._together(batch, min(OPENERS, len(wanted)), self._open_some, lambda: self._begin_reading(batch, count))
            return 0

        # Nothing to do without room; and nothing can be begun any more when the engine is closed.
        with contextlib.suppress(RuntimeError):
            if self._limit:
                batch.prefetch.futures.append(self._pool.submit(begin))
        return batch.prefetch

    def take(self, keys: Iterable[ChunkKey]) -> dict[ChunkKey, ChunkReader]:
        """The open readers of those of these chunks that are being read here, with what was read so far: a request begins that
        goes on from there, and closes them.
        """
        with self._lock:
            taken = {key: self._chunks.pop(key) for key in list(keys) if key in self._chunks}
            for chunk in taken.values():
                chunk.gone = True
        readers = {}
        for key, chunk in taken.items():
            while chunk.reading:
                time.sleep(_BREATH)
            if chunk.failed:
                chunk.reader.close()
            else:
                readers[key] = chunk.reader
        return readers

    def has(self, key: ChunkKey) -> bool:
        """Whether a chunk is being read here."""
        return key in self._chunks

    def close(self) -> None:
        """Stop; when this returns, nothing is read any more."""
        self._stop.set()
        self._pool.shutdown(wait=True, cancel_futures=True)

    # -- on the threads -------------------------------------------------------------------------------------------

    def _together(self, batch: _Batch, count: int, work: Callable[[_Batch], int], then: Callable[[], None]) -> None:
        """Have `work(batch)` done on several threads, at most `count`; the last one that ends, or is cancelled, calls `then`."""
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
            try:
                future = self._pool.submit(run)
            except RuntimeError:  # closed meanwhile
                ended()
                continue
            future.add_done_callback(lambda job: ended() if job.cancelled() else None)
            batch.prefetch.futures.append(future)

    def _open_some(self, batch: _Batch) -> int:
        """Open chunks that nobody has opened yet."""
        while not self._stopped(batch):
            with self._lock:
                number, key = next(batch.keys, (-1, None))
            if key is None:
                break
            try:
                batch.found[number] = self._store.touch_host(key) or self._store.open(key) or 0
            except (StoreError, OSError) as error:
                _log.debug("chunk %s was not read ahead: %s", key, error)
        return 0

    def _begin_reading(self, batch: _Batch, rows: Callable[[ChunkReader], int]) -> None:
        """All are open: give room to the first ones, and read them."""
        unwanted = []
        for number in sorted(batch.found):
            found = batch.found[number]
            if isinstance(found, int):
                batch.take_room(found)
                continue
            key, first, layers = found.key, rows(found), len(found.layout.layers)
            fits = batch.room > 0 and not self._stopped(batch) and batch.take_room(found.host_bytes)
            with self._lock:
                if fits and key not in self._chunks and not self._elsewhere(key):
                    chunk = _Chunk(found, first, layers if first == found.layout.tokens else 2 * layers)
                    self._chunks[key] = chunk
                    batch.chunks.append(chunk)
                else:
                    unwanted.append(found)
        for reader in unwanted:
            reader.close()
        batch.order = batch.reads()
        self._wait(partial(self._stopped, batch))  # one thread does, instead of all
        self._together(batch, sum(c.left for c in batch.chunks), self._read_some, lambda: self._end(batch))

    def _read_some(self, batch: _Batch) -> int:
        """Read what nobody is reading yet; bytes of the chunks that came to be in host memory."""
        filled = 0
        while (read := self._next(batch)) is not None:
            filled += self._read(batch, *read)
        return filled

    def _next(self, batch: _Batch) -> tuple[_Chunk, int, int] | None:
        self._wait(partial(self._stopped, batch))
        with self._lock:
            for chunk, layer, rows in batch.order:
                if self._stopped(batch):
                    return None
                if not chunk.gone and not chunk.failed:
                    chunk.reading += 1
                    return chunk, layer, rows
        return None

    def _read(self, batch: _Batch, chunk: _Chunk, layer: int, rows: int) -> int:
        reader, there = chunk.reader, False
        try:
            reader.read(layer, rows)
            with self._lock:
                chunk.left -= 1
                last = not chunk.left and not chunk.gone
            if last:
                there = reader.promote()
                if not there:
                    batch.prefetch.stop.set()  # all memory is in use: what comes next won't fit either
        except (StoreError, OSError) as error:
            # Damage too: the request finds it again, and its report then tells.
            _log.debug("chunk %s was not read ahead: %s", reader.key, error)
            chunk.failed = True
        with self._lock:
            chunk.reading -= 1
            over = (chunk.failed or not chunk.left) and not chunk.reading and not chunk.gone
            if over:
                chunk.gone = True
                del self._chunks[reader.key]
        if over:
            reader.close()
        return reader.host_bytes if there else 0

    def _end(self, batch: _Batch) -> None:
        """Nothing of a batch is read any more: close what nobody took."""
        with self._lock:
            dropped = [chunk for chunk in batch.chunks if not chunk.gone]
            for chunk in dropped:
                chunk.gone = True
                del self._chunks[chunk.reader.key]
        for chunk in dropped:
            chunk.reader.close()

    def _stopped(self, batch: _Batch) -> bool:
        return self._stop.is_set() or batch.prefetch.stop.is_set()
