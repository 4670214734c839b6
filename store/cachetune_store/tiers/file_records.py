"""What the index says of chunk files: size and last use of each, and the totals. Processes that share a directory share these records."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from ..chunk import ChunkHead
from ..errors import IndexDamagedError
from ..index import Index
from ..keys import ChunkKey
from ..printing import shown
from ..seals import Seal
from ..texts import evict_text, note_text
from .lru import LruOrder

__all__ = ["FileRecords"]


class FileRecords:
    """The records of a disk tier's files, and which of these were used longest ago. Safe to use from several threads.

    Args:
        index: where the records are.
        seal: hides the texts that are noted with them.
    """

    def __init__(self, index: Index, seal: Seal) -> None:
        self._index, self._seal = index, seal
        self._lru = LruOrder(index)
        self._touched: dict[str, float] = {}
        self._lock = threading.Lock()

    def knows(self, key: ChunkKey) -> bool:
        """Whether there is a record of a chunk's file."""
        return self._index.get(f"chunk/{key}") is not None

    def size_of(self, key: ChunkKey) -> int:
        """Bytes of a chunk's file by its record; 0 if there is none."""
        record = self._index.get(f"chunk/{key}")
        return 0 if record is None else int(record["size"])

    def chunks(self) -> list[ChunkKey]:
        """All chunks of which there is a record.

        Raises:
            IndexDamagedError: a record names no chunk.
        """
        found = []
        for name in list(self._index.names("chunk/")):
            try:
                found.append(ChunkKey(name.removeprefix("chunk/")))
            except ValueError as error:
                raise IndexDamagedError(f"the index holds {shown(name)}, which names no chunk") from error
        return found

    def total(self) -> dict[str, int]:
        """Bytes and chunks of all files, and how many were ever stored."""
        return self._index.get("total") or {"bytes": 0, "chunks": 0, "stored": 0}

    def add(self, head: ChunkHead, size: int, used: float) -> None:
        """A file was written, or one was found that isn't known, or is known with another size. Its text is noted, too."""
        with self._index.transaction():
            old = self._index.get(f"chunk/{head.key}")
            self._index.set(f"chunk/{head.key}", {"size": size, "used": used, "tokens": head.layout.tokens})
            self.note_text(head)
            self._add_total(size - (old["size"] if old else 0), 0 if old else 1, stored=1)
        self._lru.add(used, head.key.digest)

    def note_text(self, head: ChunkHead) -> None:
        """Note the text of a chunk, if it has one."""
        note_text(self._index, head, self._seal)

    def forget(self, key: ChunkKey) -> None:
        """A file is gone. Its text goes as well, unless a document holds the chunk or the remote tier has it."""
        with self._index.transaction():
            record = self._index.get(f"chunk/{key}")
            if record is not None:
                self._index.delete(f"chunk/{key}")
                evict_text(self._index, key)
                self._add_total(-record["size"], -1, stored=0)

    def recount(self) -> None:
        """Compute the totals from the records again."""
        with self._index.transaction():
            sizes = [record["size"] for _, record in self._index.items("chunk/")]
            self._index.set("total", self.total() | {"bytes": sum(sizes), "chunks": len(sizes)})

    def touch(self, key: ChunkKey) -> None:
        """A file is used now. Uses are collected, and written by `flush` together, so that no request waits for it."""
        with self._lock:
            self._touched[key.digest] = time.time()

    def flush(self) -> None:
        """Write the uses that were collected."""
        if not self._touched:
            return
        with self._index.transaction():
            with self._lock:
                touched, self._touched = self._touched, {}
            for digest, used in touched.items():
                record = self._index.get(f"chunk/{digest}")
                if record is not None and record["used"] < used:
                    self._index.set(f"chunk/{digest}", record | {"used": used})

    def victims(self, short: int, spared: Callable[[str], bool]) -> list[ChunkKey] | None:
        """The chunks used longest ago that together free `short` bytes; None if all that may be evicted are too few.

        Call it inside a transaction.

        Args:
            short: bytes that are wanted.
            spared: says of a digest whether its chunk may not be evicted.
        """
        self.flush()
        found = self._lru.victims(short, spared)
        return None if found is None else [ChunkKey(digest) for digest in found]

    def _add_total(self, size: int, chunks: int, *, stored: int) -> None:
        total = self.total()
        new = {
            "bytes": total["bytes"] + size,
            "chunks": total["chunks"] + chunks,
            "stored": total["stored"] + stored,
        }
        self._index.set("total", new)
