"""What one request knows of its chunks: which are open, and which can't be had from the store, and why."""

from __future__ import annotations

import threading

from cachetune_store import ChunkKey, ChunkReader, ChunkStore, DamagedChunkError, StoreError


class OpenReaders:
    """Readers to be closed when the request is done, also those that a lookup which was left behind opens later."""

    def __init__(self) -> None:
        self._readers: list[ChunkReader] = []
        self._closed = False
        self._lock = threading.Lock()

    def add(self, reader: ChunkReader) -> None:
        """Close it with the others."""
        with self._lock:
            late = self._closed
            if not late:
                self._readers.append(reader)
        if late:
            reader.close()

    def release(self, reader: ChunkReader) -> None:
        """Somebody else closes it."""
        with self._lock:
            self._readers.remove(reader)

    def close(self) -> None:
        """Close them all."""
        with self._lock:
            self._closed = True
            readers, self._readers = self._readers, []
        for reader in readers:
            reader.close()


class Faults:
    """Chunks that a request goes on without, although they are or may be stored.

    Attributes:
        damaged: they were set aside.
        unreadable: the system refused to read them.
        timed_out: the disk didn't answer in time, so that nobody knows.
        disk_gone: it didn't: only chunks in host memory are used.
    """

    def __init__(self) -> None:
        self.damaged: set[ChunkKey] = set()
        self.unreadable: set[ChunkKey] = set()
        self.timed_out: set[ChunkKey] = set()
        self.disk_gone = False

    def open(self, store: ChunkStore, key: ChunkKey) -> ChunkReader | None:
        """The chunk's reader, unless it has failed in this request before."""
        if key in self.damaged or key in self.unreadable:
            return None
        if self.disk_gone:
            reader = store.open_in_memory(key)
            if reader is None:
                self.timed_out.add(key)
            return reader
        errors: list[StoreError] = []
        reader = store.open(key, errors=errors)
        for error in errors:
            self.failed(key, set_aside=isinstance(error, DamagedChunkError))
        return reader

    def failed(self, key: ChunkKey, *, set_aside: bool) -> None:
        """A read failed: because the chunk is damaged, and now set aside, or for another reason."""
        (self.damaged if set_aside else self.unreadable).add(key)
