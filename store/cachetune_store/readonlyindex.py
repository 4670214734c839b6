"""The index of a store whose directory may be read but not written."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from .connections import Connections
from .database import BUSY_SECONDS, count_names, decode, plain_name, select_names
from .errors import IndexDamagedError, StoreReadOnlyError
from .index import Index, MemoryIndex
from .printing import shown
from .records import checked
from .seals import CHECKSUMS, Seal

__all__ = ["ReadOnlyIndex"]


class ReadOnlyIndex(Index):
    """Reads the database in `directory`, which others may be writing. If it can't be read, clear() makes an index in memory."""

    def __init__(self, directory: Path, seal: Seal = CHECKSUMS) -> None:
        self._seal = seal
        self._file = directory / "cache.db"
        self._lock = threading.Lock()
        self._connections: Connections | None = None
        self._seen: tuple[int, ...] | None = None
        self._memory: MemoryIndex | None = None

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """See Index."""
        if self._memory is None:
            raise StoreReadOnlyError(f"the index {self._file.parent} can't be written to")
        with self._memory.transaction():
            yield

    def get(self, name: str) -> Any:
        """See Index."""
        if self._memory is not None:
            return self._memory.get(name)
        with self._read() as connection:
            rows = connection.execute(
                "SELECT mode, filename, value FROM Cache WHERE key = ? AND raw = 1", (self._seal.index_name(name),)
            ).fetchall()
        if not rows:
            return None
        mode, filename, value = rows[0]
        found, record = decode(mode, filename, value, self._seal)
        if found != name:
            raise IndexDamagedError(f"the index holds the record of {shown(found)} under {shown(name)}")
        return checked(name, record)

    def set(self, name: str, record: Any) -> None:
        """See Index."""
        with self.transaction():
            assert self._memory is not None
            self._memory.set(name, record)

    def delete(self, name: str) -> bool:
        """See Index."""
        with self.transaction():
            assert self._memory is not None
            return self._memory.delete(name)

    def names(self, prefix: str) -> Iterator[str]:
        """See Index."""
        if self._memory is not None:
            yield from self._memory.names(prefix)
            return
        after = ""
        while True:
            with self._read() as connection:
                page = select_names(connection, prefix, after)
            if not page:
                return
            yield from (plain_name(hidden, self._seal) for hidden in page)
            after = page[-1]

    def place(self, name: str) -> str:
        """See Index."""
        return name if self._memory is not None else self._seal.index_name(name)

    def count(self, prefix: str) -> int:
        """See Index."""
        if self._memory is not None:
            return self._memory.count(prefix)
        with self._read() as connection:
            return count_names(connection, prefix)

    def clear(self) -> None:
        """See Index. From now on the index is in memory."""
        self.close()
        self._memory = MemoryIndex()

    def close(self) -> None:
        """See Index."""
        with self._lock:
            connections, self._connections = self._connections, None
        if connections is not None:
            connections.close()

    @contextlib.contextmanager
    def _read(self) -> Iterator[sqlite3.Connection]:
        """A connection to the database that is in the directory now."""
        try:
            with self._lock:
                seen = _state(self._file)
                if self._connections is not None and seen != self._seen:
                    self._connections.close()
                    self._connections = None
                if self._connections is None:
                    self._connections, self._seen = Connections(self._file, _connect), seen
                connections = self._connections
            with connections.lent() as connection:
                yield connection
        except (sqlite3.Error, OSError) as error:
            raise IndexDamagedError(f"the index {self._file.parent} can't be read ({error})") from error


def _state(file: Path) -> tuple[int, ...]:
    """Numbers that change when the database is replaced or written to."""
    status = file.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise IndexDamagedError(f"{file} is not a plain file")
    return status.st_ino, status.st_size, status.st_mtime_ns


def _connect(file: Path) -> sqlite3.Connection:
    """A connection that writes nothing, not even the files that SQLite keeps beside a database in use."""
    place = f"file:{quote(os.fspath(file))}"
    with contextlib.suppress(sqlite3.OperationalError):
        return _open(f"{place}?mode=ro")
    # Without those files nobody has the database open, and its file alone can be read, unless there is a log with changes.
    log = file.with_name(f"{file.name}-wal")
    if log.exists() and log.stat().st_size:
        raise IndexDamagedError(f"the index {file.parent} has a log that can't be read without writing")
    return _open(f"{place}?mode=ro&immutable=1")


def _open(uri: str) -> sqlite3.Connection:
    connection = sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("SELECT 1 FROM Cache LIMIT 1").fetchall()
    except BaseException:
        connection.close()
        raise
    return connection
