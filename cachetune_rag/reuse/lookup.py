"""What one request knows of its chunks: which are open, and which can't be had from the store, and why."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from cachetune_rag.concurrency.workers import Job
from cachetune_store import ChunkKey, ChunkReader, ChunkStore, DamagedChunkError, StoreError

Start = Callable[..., Job[Any]]
"""`start(work, *args)` begins a call on another thread."""


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

    def open(
        self,
        store: ChunkStore,
        keys: Iterable[ChunkKey],
        opened: OpenReaders,
        start: Start,
        taken: Mapping[ChunkKey, ChunkReader],
    ) -> dict[ChunkKey, ChunkReader | None]:
        """Readers of chunks, None for those that aren't stored or have failed in this request before.

        Args:
            store: where they are.
            keys: of the chunks, each once.
            opened: gets every reader.
            start: begins a call on a thread. Files are opened side by side: a disk takes far longer to answer than to read a
                file's head.
            taken: those that are open already.
        """
        readers: dict[ChunkKey, ChunkReader | None] = {}
        waiting: dict[ChunkKey, Job[tuple[ChunkReader | None, list[StoreError]]]] = {}
        for there in taken.values():
            opened.add(there)
        readers.update(taken)
        for key in keys:
            if key in taken:
                continue
            failed = key in self.damaged or key in self.unreadable
            reader = readers[key] = None if failed else store.open_in_memory(key)
            if reader is not None:
                opened.add(reader)
            elif self.disk_gone and not failed:
                self.timed_out.add(key)
            elif not failed:
                waiting[key] = start(_open, store, key, opened)
        for key, future in waiting.items():
            readers[key], errors = future.result()
            for error in errors:
                self.failed(key, set_aside=isinstance(error, DamagedChunkError))
        return readers

    def failed(self, key: ChunkKey, *, set_aside: bool) -> None:
        """A read failed: because the chunk is damaged, and now set aside, or for another reason."""
        (self.damaged if set_aside else self.unreadable).add(key)


def _open(store: ChunkStore, key: ChunkKey, opened: OpenReaders) -> tuple[ChunkReader | None, list[StoreError]]:
    errors: list[StoreError] = []
    reader = store.open(key, errors=errors)
    if reader is not None:
        opened.add(reader)  # at once: whoever asked may have given up
    return reader, errors
