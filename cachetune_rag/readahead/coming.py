"""Reads the chunks of coming requests, layer by layer, until the request comes and takes them over.

A request needs the first layer of every chunk before the second layer of any, so that is the order of reading. When the request comes,
it gets the open chunks and goes on reading where this stopped.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

from cachetune_rag.readahead.batch import Batch, ChunkBeingRead, Prefetch
from cachetune_rag.readahead.batch_work import BatchWork
from cachetune_rag.readahead.reserved import Reserved
from cachetune_store import ChunkKey, ChunkReader, ChunkStore, StoreError

OPENERS = 2
"""Threads that open chunks. Few: opening needs the interpreter, which the request that is being served needs more."""
_BREATH = 0.0005
"""Polling interval while a read finishes, seconds."""

_log = logging.getLogger(__name__)


class ReadAhead:
    """Reads for coming requests, on threads. Safe to use from several threads. It raises nothing.

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
        self._work = BatchWork()
        # Guards `_chunks`, the counts of each chunk there and who closes it, `_reserved`, and which chunk of a batch is opened or read next. The timers, and how
        # many threads still work at a batch, are guarded by the lock of `BatchWork`. Neither lock is taken while the other one is held.
        self._lock = threading.Lock()
        self._chunks: dict[ChunkKey, ChunkBeingRead] = {}
        # For the chunks that `go_on` and `read_later` were given and that are not in `_chunks` yet.
        self._reserved = Reserved(limit)

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

        def begin() -> None:
            wanted = list(dict.fromkeys(keys()))
            batch.keys = enumerate(wanted)
            self._work.together(batch, min(OPENERS, len(wanted)), self._open_some, opened)

        if self._limit:  # without room there is nothing to do
            self._work.begin(batch, begin, lambda: None)  # nothing is held yet that would have to be dropped
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

        def begin() -> None:
            try:
                self._give_room(batch, rows or _all_rows)
            finally:
                self._free(batch)
            if after:
                self._work.begin_later(batch, after, lambda: self._begin_reading(batch), lambda: self._end(batch))
            else:
                self._begin_reading(batch)

        def close() -> None:
            for reader in readers:
                reader.close()

        def drop() -> None:
            self._free(batch)
            close()

        with self._lock:
            fitting = self._reserved.reserve(batch, [reader.host_bytes for reader in readers], self._bytes_of_chunks())
        if fitting:
            self._work.begin(batch, begin, drop)
        else:
            close()
        return len(readers) - fitting

    def read_later(self, sizes: Mapping[ChunkKey, int], rows: Callable[[ChunkReader], int], after: float) -> int:
        """As `go_on`, for chunks that are opened only when they are read: nothing is done for them before.

        Args:
            sizes: the chunks' keys, in the order in which they are read, and the bytes that each takes in host memory. Those that are read here already, or will be, are
                not put off again: otherwise chunks that every prompt shows would never be read.
            rows, after: see `go_on`. A request that needs the chunks before opens them itself.

        Returns:
            See `go_on`.
        """
        batch = Batch(self._limit)
        with self._lock:
            here = {*self._chunks, *self._reserved.unopened}
            wanted = {key: size for key, size in sizes.items() if key not in here}
            fitting = self._reserved.reserve_unopened(batch, wanted, self._bytes_of_chunks())
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
            self._work.together(batch, min(OPENERS, len(keys)), self._open_some, opened)

        waits = self._work.begin_later(batch, after, begin, lambda: self._end(batch))
        return len(wanted) - fitting if waits else len(wanted)

    def take(self, keys: Iterable[ChunkKey]) -> dict[ChunkKey, ChunkReader]:
        """Hand the chunks among these that are being read here to a request that begins: their open readers, which hold what was
        read so far. The request closes them.
        """
        with self._lock:
            wanted = list(keys)
            for key in wanted:
                self._reserved.give_up(key)
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
            return {*self._chunks, *self._reserved.unopened}

    @property
    def closing(self) -> bool:
        """Whether `close` was called."""
        return self._work.closing

    def close(self) -> None:
        """Stop; when this returns, nothing is read any more."""
        self._work.close()

    # -- on the threads -------------------------------------------------------------------------------------------

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

    def _bytes_of_chunks(self) -> int:
        """Bytes of the chunks that are being read. Called with the lock held."""
        return sum(chunk.reader.host_bytes for chunk in self._chunks.values())

    def _forget_unopened(self, batch: Batch) -> list[ChunkKey]:
        """The chunks that `read_later` was given and no request has taken. They don't wait to be opened any more."""
        with self._lock:
            return self._reserved.forget_unopened(batch)

    def _free(self, batch: Batch) -> None:
        """The batch's chunks are in `_chunks`, or not wanted any more."""
        with self._lock:
            self._reserved.free(batch)

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
        self._work.together(batch, sum(c.left for c in batch.chunks), self._read_some, lambda: self._end(batch))

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
        return self.closing or batch.prefetch.stop.is_set()


def _all_rows(reader: ChunkReader) -> int:
    return reader.layout.tokens
