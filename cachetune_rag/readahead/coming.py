"""Reads the chunks of coming requests, layer by layer, until the request comes and takes them over.

A request needs the first layer of every chunk before the second layer of any, so that is the order of reading. When the request comes,
it gets the open chunks and goes on reading where this stopped.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import accumulate, islice

from cachetune_rag.concurrency.workers import Workers
from cachetune_rag.readahead.batch import Batch, ChunkBeingRead, Prefetch
from cachetune_store import ChunkKey, ChunkReader, ChunkStore, StoreError

THREADS = 4
"""Enough to keep a disk busy. More would take the interpreter from the request that is being served more often."""
OPENERS = 2
"""Threads that open chunks. Few: opening needs the interpreter, which the request that is being served needs more."""
_BREATH = 0.0005
"""Polling interval while a read finishes, seconds."""

_log = logging.getLogger(__name__)


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
        self._chunks: dict[ChunkKey, ChunkBeingRead] = {}
        # Bytes of the chunks that `go_on` and `read_later` were given and that are not in `_chunks` yet.
        self._handed = 0
        self._unopened: dict[ChunkKey, Batch] = {}  # those that `read_later` was given
        self._later: dict[Batch, threading.Timer] = {}  # those of which nothing is to be read yet

    def fetch(
        self, keys: Callable[[], Iterable[ChunkKey]], rows: Callable[[ChunkReader], int] | None = None
    ) -> Prefetch:
        """Read chunks that are on disk and not in host memory, as far as they fit, in the given order.

        Args:
            keys: gives the chunks' keys. Called on one of the threads here, because tokenising a long prompt would hold the caller up.
            rows: how many rows of each layer of an open chunk the request will need; None: all. The others are read afterwards.
        """
        batch = Batch(self._limit)
        count = rows or _all_rows

        def opened() -> None:
            self._give_room(batch, count)
            self._begin_reading(batch)

        def begin() -> int:
            wanted = list(dict.fromkeys(keys()))
            batch.keys = enumerate(wanted)
            self._together(batch, min(OPENERS, len(wanted)), self._open_some, opened)
            return 0

        # Without room there is nothing to do. RuntimeError: the engine is closed, so nothing can be started any more.
        with contextlib.suppress(RuntimeError):
            if self._limit:
                batch.prefetch.futures.append(self._pool.submit(begin))
        return batch.prefetch

    def go_on(
        self, readers: Sequence[ChunkReader], rows: Callable[[ChunkReader], int] | None = None, after: float = 0.0
    ) -> int:
        """As `fetch`, for chunks that are open already. What was read of them isn't read again.

        Where these and what is read already are more than `limit`, these are only closed: each would push another one out of host memory, and a server that
        asks for more than its disk gives would have ever more files open.

        Args:
            readers: are closed here.
            rows: see `fetch`.
            after: seconds in which nothing is read of them; a request that needs them meanwhile gets them.

        Returns:
            How many are not read, because there is no room for them.
        """
        batch = Batch(self._limit)
        batch.found = dict(enumerate(readers))

        def begin() -> int:
            try:
                self._give_room(batch, rows or _all_rows)
            finally:
                self._free(batch)
            if after:
                self._later_on(batch, after, lambda: self._begin_reading(batch))
            else:
                self._begin_reading(batch)
            return 0

        def close() -> None:
            for reader in readers:
                reader.close()

        def drop() -> None:
            self._free(batch)
            close()

        with self._lock:
            fitting = self._reserve(batch, [reader.host_bytes for reader in readers])
        if fitting:
            self._submit(batch, begin, drop)
        else:
            close()
        return len(readers) - fitting

    def read_later(self, sizes: Mapping[ChunkKey, int], rows: Callable[[ChunkReader], int], after: float) -> int:
        """As `go_on`, for chunks that are opened only when they are read: nothing is done for them before.

        Args:
            sizes: the chunks' keys, in the order in which they are read, and the bytes that each takes in host memory. Those that are read here already, or will be, are
                left to that: put off by each further prompt, what all prompts show would never be read.
            rows, after: see `go_on`. A request that needs the chunks before opens them itself.

        Returns:
            See `go_on`.
        """
        batch = Batch(self._limit)
        with self._lock:
            here = self._chunks.keys() | self._unopened.keys()
            wanted = {key: size for key, size in sizes.items() if key not in here}
            fitting = self._reserve(batch, list(wanted.values()))
            # Of the others nobody else is to think that they will be read.
            batch.unopened = dict(islice(wanted.items(), fitting))
            self._unopened |= dict.fromkeys(batch.unopened, batch)
        if not fitting:
            return len(wanted)

        def opened() -> None:
            try:
                self._give_room(batch, rows)
            finally:
                self._free(batch)
            self._begin_reading(batch)

        def begin() -> None:
            keys = self._forget_unopened(batch)
            batch.keys = enumerate(keys)
            self._together(batch, min(OPENERS, len(keys)), self._open_some, opened)

        return len(wanted) - fitting if self._later_on(batch, after, begin) else len(wanted)

    def take(self, keys: Iterable[ChunkKey]) -> dict[ChunkKey, ChunkReader]:
        """Hand the chunks among these that are being read here to a request that begins: their open readers, which hold what was
        read so far. The request closes them.
        """
        with self._lock:
            wanted = list(keys)
            for key in wanted:
                if (batch := self._unopened.pop(key, None)) is not None:
                    self._handed -= (size := batch.unopened.pop(key))
                    batch.reserved -= size
            taken = {key: self._chunks.pop(key) for key in wanted if key in self._chunks}
            for chunk in taken.values():
                chunk.gone = True
                chunk.reader.timed = True
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

    def has_begun(self, key: ChunkKey) -> bool:
        """Whether a chunk is being read here, and some of it is read already."""
        chunk = self._chunks.get(key)
        return chunk is not None and bool(chunk.reading or chunk.reader.bytes_read)

    @property
    def keys(self) -> set[ChunkKey]:
        """The chunks that are being read here, and those that will be."""
        with self._lock:
            return {*self._chunks, *self._unopened}

    @property
    def closing(self) -> bool:
        """Whether `close` was called."""
        return self._stop.is_set()

    def close(self) -> None:
        """Stop; when this returns, nothing is read any more."""
        self._stop.set()
        with self._lock:
            later, self._later = self._later, {}
        for batch, timer in later.items():
            timer.cancel()
            self._end(batch)
        self._pool.shutdown(wait=True, cancel_futures=True)

    # -- on the threads -------------------------------------------------------------------------------------------

    def _together(self, batch: Batch, count: int, work: Callable[[Batch], int], then: Callable[[], None]) -> None:
        """Do `work(batch)` on several threads, at most `count`. The last one that ends or is cancelled calls `then`."""
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

    def _open_some(self, batch: Batch) -> int:
        """Open chunks that no thread has opened yet."""
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

    def _reserve(self, batch: Batch, sizes: Sequence[int]) -> int:
        """Reserve what may be read ahead for chunks of so many bytes, as far as they fit. Returns how many of them, the first ones, do. Called with the lock held."""
        totals = [total for total in accumulate(sizes) if total <= self._limit]
        before = self._handed + sum(chunk.reader.host_bytes for chunk in self._chunks.values())
        if before and before + sum(sizes) > self._limit:
            totals = []
        batch.reserved = totals[-1] if totals else 0
        self._handed += batch.reserved
        if len(totals) < len(sizes):
            _log.debug(
                "%d of %d chunks are not read on: there is no room for them", len(sizes) - len(totals), len(sizes)
            )
        return len(totals)

    def _forget_unopened(self, batch: Batch) -> list[ChunkKey]:
        """The chunks that `read_later` was given and no request has taken. They don't wait to be opened any more."""
        with self._lock:
            keys = list(batch.unopened)
            batch.unopened = {}
            for key in keys:
                self._unopened.pop(key, None)
        return keys

    def _free(self, batch: Batch) -> None:
        """The batch's chunks are in `_chunks`, or not wanted any more."""
        with self._lock:
            self._handed -= batch.reserved
            batch.reserved = 0

    def _give_room(self, batch: Batch, rows: Callable[[ChunkReader], int]) -> None:
        """All chunks are open: give room to the first ones, which are read, and close the others."""
        unwanted = []
        for number in sorted(batch.found):
            found = batch.found[number]
            if isinstance(found, int):
                batch.take_room(found)
                continue
            key, first, layers = found.key, rows(found), len(found.layout.layers)
            fits = batch.room > 0 and not self._stopped(batch) and batch.take_room(found.host_bytes)
            with self._lock:
                # Memory is asked last: a request that had the chunk open keeps it there before it says that it is done with it.
                if fits and key not in self._chunks and not self._elsewhere(key) and not self._store.touch_host(key):
                    chunk = ChunkBeingRead(found, first, layers if first == found.layout.tokens else 2 * layers)
                    found.timed = False
                    self._chunks[key] = chunk
                    batch.chunks.append(chunk)
                else:
                    unwanted.append(found)
        for reader in unwanted:
            reader.close()

    def _begin_reading(self, batch: Batch) -> None:
        """Read the chunks that were given room."""
        batch.order = batch.reads()
        self._wait(partial(self._stopped, batch))  # one thread does, instead of all
        self._together(batch, sum(c.left for c in batch.chunks), self._read_some, lambda: self._end(batch))

    def _later_on(self, batch: Batch, after: float, begin: Callable[[], None]) -> bool:
        """Call `begin` on a thread so many seconds from now. Returns whether it will be; if not, the batch ends."""
        timer = threading.Timer(after, self._due, (batch, begin))
        timer.daemon = True
        with self._lock:
            started = not self.closing
            if started:
                self._later[batch] = timer
                try:
                    timer.start()
                except RuntimeError as error:  # the system gives no more threads
                    _log.debug("chunks are not read on: %s", error)
                    del self._later[batch]
                    started = False
        if not started:
            self._end(batch)
        return started

    def _due(self, batch: Batch, begin: Callable[[], None]) -> None:
        with self._lock:
            mine = self._later.pop(batch, None)
        if mine is None:  # closed meanwhile
            return

        def run() -> int:
            begin()
            return 0

        self._submit(batch, run, partial(self._end, batch))

    def _submit(self, batch: Batch, begin: Callable[[], int], drop: Callable[[], None]) -> None:
        """Let a thread begin something with a batch's open chunks. `drop` is called instead where the engine is closed before a thread gets to it."""
        try:
            job = self._pool.submit(begin)
        except RuntimeError:  # closed already
            drop()
            return
        job.add_done_callback(lambda ended: drop() if ended.cancelled() else None)
        batch.prefetch.futures.append(job)

    def _read_some(self, batch: Batch) -> int:
        """Read what no thread is reading yet. Gives the bytes of the chunks that are in host memory now."""
        filled = 0
        while (read := self._next(batch)) is not None:
            filled += self._read(batch, *read)
        return filled

    def _next(self, batch: Batch) -> tuple[ChunkBeingRead, int, int] | None:
        self._wait(partial(self._stopped, batch))
        with self._lock:
            for chunk, layer, rows in batch.order:
                if self._stopped(batch):
                    return None
                if not chunk.gone and not chunk.failed:
                    chunk.reading += 1
                    return chunk, layer, rows
        return None

    def _read(self, batch: Batch, chunk: ChunkBeingRead, layer: int, rows: int) -> int:
        reader, there = chunk.reader, False
        try:
            if not layer:
                # Before all rows, because a selector that uses them needs them first. They come up with the chunk in any case.
                _ = reader.deviations
            reader.read(layer, rows)
            with self._lock:
                chunk.left -= 1
                last = not chunk.left and not chunk.gone
            if last:
                there = reader.promote()
                if not there:
                    batch.prefetch.stop.set()  # all memory is in use: what comes next won't fit either
        except (StoreError, OSError) as error:
            # Damage too: the request finds it again, and its report says so.
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

    def _end(self, batch: Batch) -> None:
        """Nothing of a batch is read any more: close the chunks that no request took."""
        self._forget_unopened(batch)
        self._free(batch)
        with self._lock:
            dropped = [chunk for chunk in batch.chunks if not chunk.gone]
            for chunk in dropped:
                chunk.gone = True
                del self._chunks[chunk.reader.key]
        for chunk in dropped:
            chunk.reader.close()

    def _stopped(self, batch: Batch) -> bool:
        return self._stop.is_set() or batch.prefetch.stop.is_set()


def _all_rows(reader: ChunkReader) -> int:
    return reader.layout.tokens
