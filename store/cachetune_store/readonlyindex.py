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
from .errors import IndexDamagedError, IndexReplacedError, StoreReadOnlyError
from .index import COMPLETE, Index, MemoryIndex
from .printing import shown
from .records import checked
from .seals import CHECKSUMS, Seal

__all__ = ["ReadOnlyIndex"]


class ReadOnlyIndex(Index):
    """Reads the database in `directory`, which others may be writing.

    If it can't be read, or isn't filled, an index is made in memory (`made_anew`), and used until there is another database that is filled.
    """

    def __init__(self, directory: Path, seal: Seal = CHECKSUMS) -> None:
        self._seal = seal
        self._file = directory / "cache.db"
        self._lock = threading.Lock()
        self._connections: Connections | None = None
        self._seen: _State | None = None
        self._filled: Connections | None = None
        """Those of a database of which it is known that all records are there."""
        self._memory: MemoryIndex | None = None
        self._left: tuple[_State | None, bool] = (None, False)
        """The database's state when the index in memory was made or last looked whether it is still needed, and whether that was filled."""
        self._filler: int | None = None
        self._filling: MemoryIndex | None = None

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """See Index."""
        with self._writable().transaction():
            yield

    def _writable(self) -> MemoryIndex:
        """What this thread is filling."""
        if self._filling is None or self._filler != threading.get_ident():
            raise StoreReadOnlyError(f"the index {self._file.parent} can't be written to")
        return self._filling

    def get(self, name: str) -> Any:
        """See Index."""
        memory = self._in_memory()
        if memory is not None:
            return memory.get(name)
        with self._read(filled=name != COMPLETE) as connection:
            return self._record(connection, name)

    def _record(self, connection: sqlite3.Connection, name: str) -> Any:
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
        self._writable().set(name, record)

    def delete(self, name: str) -> bool:
        """See Index."""
        return self._writable().delete(name)

    def names(self, prefix: str) -> Iterator[str]:
        """See Index."""
        memory = self._in_memory()
        if memory is not None:
            # In the database's order: who iterates may go on in the other one.
            yield from sorted(memory.names(prefix), key=self.place)
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
        return self._seal.index_name(name)

    def count(self, prefix: str) -> int:
        """See Index."""
        memory = self._in_memory()
        if memory is not None:
            return memory.count(prefix)
        with self._read() as connection:
            return count_names(connection, prefix)

    def clear(self) -> None:
        """See Index. What this thread writes from now on goes to an index in memory."""
        self._filling, self._filler = MemoryIndex(), threading.get_ident()

    @contextlib.contextmanager
    def made_anew(self, identity: str) -> Iterator[None]:
        """See Index. Until all records are there, nobody but this thread sees any; if that fails, nobody ever does. For one thread at a time."""
        try:
            left = self._state_now(), self._is_filled()
            with super().made_anew(identity):
                yield
            self.close()
            self._left, self._memory = left, self._filling
        finally:
            self._filling = self._filler = None

    def _in_memory(self) -> MemoryIndex | None:
        """The index in memory that this thread uses; None if it is the database."""
        if self._filler == threading.get_ident():
            return self._filling
        memory = self._memory
        if memory is None:
            return None
        (left, filled), now = self._left, self._state_now()
        if now is None or now == left:
            return memory
        # The same database as before, which could not be read then though it was filled, is damaged.
        if (left is None or not filled or now[0] != left[0]) and self._is_filled():
            self._memory = None
            return None
        self._left = (now, filled)
        return memory

    def _state_now(self) -> _State | None:
        with contextlib.suppress(OSError, IndexDamagedError):
            return (*_state(self._file), *_log_state(self._file))
        return None

    def _is_filled(self) -> bool:
        with contextlib.suppress(IndexDamagedError), self._read(filled=False) as connection:
            return self._record(connection, COMPLETE) is not None
        return False

    def close(self) -> None:
        """See Index."""
        with self._lock:
            connections, self._connections = self._connections, None
        if connections is not None:
            connections.close()

    @contextlib.contextmanager
    def _read(self, *, filled: bool = True) -> Iterator[sqlite3.Connection]:
        """A connection to the database that is in the directory now; `filled`: all records have to be there.

        Raises:
            IndexReplacedError: they aren't.
            IndexDamagedError: it can't be read.
        """
        try:
            with self._lock:
                seen = _state(self._file)
                if self._connections is not None and (seen != self._seen or self._connections.is_let_go()):
                    self._connections.close()
                    self._connections = None
                if self._connections is None:
                    self._connections, self._seen = Connections(self._file, _connect), seen
                connections = self._connections
            with connections.lent() as connection:
                # A thread's first connection may be to another database than the others.
                known = self._filled is connections and not connections.is_let_go() and _state(self._file) == seen
                if filled and not known:
                    if self._record(connection, COMPLETE) is None:
                        raise IndexReplacedError(
                            f"the index {self._file.parent} is not filled yet, or filling it was cut short"
                        )
                    self._filled = connections
                yield connection
        except (sqlite3.Error, OSError) as error:
            raise IndexDamagedError(f"the index {self._file.parent} can't be read ({error})") from error


_State = tuple[int, ...]


def _state(file: Path) -> _State:
    """Numbers that change when the database is replaced, or its file is written to: the inode number first."""
    status = file.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise IndexDamagedError(f"{file} is not a plain file")
    return status.st_ino, status.st_size, status.st_mtime_ns


def _log_state(file: Path) -> _State:
    """The same of the database's log, which is written to first; nothing if there is none."""
    try:
        status = file.with_name(f"{file.name}-wal").lstat()
    except FileNotFoundError:
        return ()
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
