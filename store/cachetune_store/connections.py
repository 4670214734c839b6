"""Connections to an SQLite database. A thread borrows one for as long as it needs it.

So a thread that ends leaves no connection open, and closing the database closes all of them. SQLite does not allow a forked process
to use, or even to close, a connection of its parent. So connections are closed before a fork, and made again when they are needed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

__all__ = ["Connections"]

FORK_SECONDS = 5.0
"""Seconds that a fork waits for threads that are using the database."""


class Connections:
    """Connections to `file`. A thread has one at a time.

    Args:
        file: the database.
        connect: makes a connection that any thread can use.
    """

    def __init__(self, file: Path, connect: Callable[[Path], sqlite3.Connection]) -> None:
        self._file, self._connect = file, connect
        self._mine = threading.local()
        self._ready = threading.Condition()
        self._idle: list[sqlite3.Connection] = []
        self._lent: list[sqlite3.Connection] = []
        self._closed = self._forking = False
        self._identity: tuple[int | None, ...] | None = None
        _all.add(self)

    @property
    def mine(self) -> sqlite3.Connection | None:
        """The connection that this thread has borrowed, or None."""
        return getattr(self._mine, "connection", None)

    @contextlib.contextmanager
    def lent(self) -> Iterator[sqlite3.Connection]:
        """A connection for this thread. Nested calls give the same one."""
        mine = self.mine
        if mine is not None:
            yield mine
            return
        taken = self._take()
        self._mine.connection = taken
        try:
            yield taken
        finally:
            self._mine.connection = None
            self._give_back(taken)

    def close(self) -> None:
        """Close the unused connections and this thread's. The others are closed when they are given back."""
        mine, self._mine.connection = self.mine, None
        with self._ready:
            self._closed = True
            idle, self._idle = self._idle, []
            if mine is not None and mine in self._lent:
                self._lent.remove(mine)
                idle.append(mine)
        for connection in idle:
            _close(connection)

    def note(self) -> None:
        """Remember which files are open. Call it after a first read, which makes the files beside the database."""
        self._identity = tuple(_inode(path) for path in (self._file, *_logs(self._file)))

    def is_replaced(self) -> bool:
        """Whether the file of the open database was replaced or removed."""
        known = self._identity
        return known is not None and _inode(self._file) not in (known[0], _UNKNOWN)

    def has_lost_its_log(self) -> bool:
        """Whether the log of the open database was removed or replaced. This process then sees other data than others do."""
        known = self._identity
        if known is None:
            return False
        pairs = zip(_logs(self._file), known[1:], strict=True)
        return any(old is not None and _inode(path) not in (old, _UNKNOWN) for path, old in pairs)

    def _take(self) -> sqlite3.Connection:
        with self._ready:
            while self._forking:
                self._ready.wait()
            if self._idle:
                taken = self._idle.pop()
            else:
                alone = not self._lent
                taken = self._connect(self._file)
                if alone:
                    self.note()
            self._lent.append(taken)
            return taken

    def _give_back(self, connection: sqlite3.Connection) -> None:
        with self._ready:
            if connection not in self._lent:
                return  # it was closed, or belongs to another process
            self._lent.remove(connection)
            if not self._closed:
                self._idle.append(connection)
            self._ready.notify_all()
        if self._closed:
            _close(connection)

    def before_fork(self, until: float) -> None:
        """Close the connections that no thread uses, and lend none until `after_fork`; wait until `until` for those that are lent."""
        if not self._ready.acquire(timeout=max(0.0, until - time.monotonic())):
            return
        try:
            self._forking = True
            own = 0 if self.mine is None else 1
            self._ready.wait_for(lambda: len(self._lent) <= own, timeout=max(0.0, until - time.monotonic()))
            idle, self._idle = self._idle, []
        finally:
            self._ready.release()
        for connection in idle:
            _close(connection)

    def after_fork(self) -> None:
        """Lend connections again, in the process that forked."""
        with self._ready:
            self._forking = False
            self._ready.notify_all()

    def in_child(self) -> None:
        """Begin without any connection, in a process that was just forked off."""
        self._ready = threading.Condition()
        self._forking = False
        for connection in self._idle + self._lent:
            # Never freed, because closing a connection here would write to files that the parent has open.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))
        self._idle, self._lent, self._identity = [], [], None


_UNKNOWN = -1
_all: weakref.WeakSet[Connections] = weakref.WeakSet()


def _logs(file: Path) -> tuple[Path, Path]:
    return file.with_name(f"{file.name}-wal"), file.with_name(f"{file.name}-shm")


def _inode(path: Path) -> int | None:
    """The number that tells a file from a later one of the same name; None if there is no file."""
    try:
        return path.stat().st_ino
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError:
        return _UNKNOWN  # it can't be read now, but the open connection may still work


def _close(connection: sqlite3.Connection) -> None:
    with contextlib.suppress(sqlite3.Error):
        connection.close()


def _every() -> list[Connections]:
    # If another thread opens a store meanwhile, iterating fails, and is tried again.
    while True:
        with contextlib.suppress(RuntimeError):
            return list(_all)


def _before_fork() -> None:
    until = time.monotonic() + FORK_SECONDS
    for each in _every():
        each.before_fork(until)


def _after_fork() -> None:
    for each in _every():
        each.after_fork()


def _in_child() -> None:
    for each in _every():
        each.in_child()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_in_child)
