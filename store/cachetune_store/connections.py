"""Connections to an SQLite database, lent to threads for as long as they use one.

None is left behind by a thread that ended, all are closed when the database is, and none is inherited by a forked process: SQLite
can't bear that, not even to close one there. Before a fork they are closed, and made again when they are needed.
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
from functools import partial
from pathlib import Path

from .errors import IndexReplacedError

__all__ = ["Connections", "fork_is_over", "forks_near"]

FORK_SECONDS = 5.0
"""Seconds that a fork waits for threads that are in the database."""
_LOOK_SECONDS = 1.0
"""Seconds after which a thread that waits for a fork's end looks whether it has missed it."""


class Connections:
    """Connections to `file`, one a thread at a time.

    Args:
        file: the database.
        connect: makes one, usable by any thread.
    """

    def __init__(self, file: Path, connect: Callable[[Path], sqlite3.Connection]) -> None:
        self._file, self._connect = file, connect
        self._mine = threading.local()
        self._ready = threading.Condition()
        self._idle: list[sqlite3.Connection] = []
        self._lent: list[sqlite3.Connection] = []
        self._closed = self._retired = self._let_go = False
        self._identity: tuple[int | None, ...] | None = None
        with _guard:
            _all.add(self)

    @property
    def mine(self) -> sqlite3.Connection | None:
        """The one that this thread has been lent."""
        return getattr(self._mine, "connection", None)

    @contextlib.contextmanager
    def lent(self) -> Iterator[sqlite3.Connection]:
        """This thread's connection; the same one inside of itself.

        Raises:
            IndexReplacedError: they are retired.
        """
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
        """Close them: those that nobody uses and this thread's now, others when they are given back."""
        mine, self._mine.connection = self.mine, None
        with self._ready:
            self._closed = True
            idle, self._idle = self._idle, []
            if mine is not None and mine in self._lent:
                self._lent.remove(mine)
                idle.append(mine)
            # With the lock held, so that a fork waits for it.
            for connection in idle:
                _close(connection)

    def let_go(self) -> None:
        """Close them, because the database has to be opened anew."""
        self._let_go = True
        self.close()

    def retire(self) -> None:
        """Close them, and lend none any more: the database's files are about to be removed.

        A thread that still has this object would otherwise make a new database in the midst of that, of which half would be removed again.
        """
        with self._ready:
            self._retired = True
        self.let_go()

    def note(self) -> None:
        """Remember which files are open; those beside the database are there once it has been read."""
        self._identity = tuple(_inode(path) for path in (self._file, *_logs(self._file)))

    def is_let_go(self) -> bool:
        """Whether the file was open in no connection since it was looked at.

        Another database may have taken its place then, even one with the same inode number: a file's number is free once nobody has it open.
        """
        return self._let_go

    def is_replaced(self) -> bool:
        """Whether another database stands in the file's place than the one that is open, or none.

        It can't be told of one that was let go.
        """
        known = self._identity
        if known is None:
            return False
        now = _inode(self._file)
        # A file that could not be looked at when it was opened is opened again once it can.
        return now != _UNKNOWN and (now != known[0] or _UNKNOWN in known)

    def has_lost_its_log(self) -> bool:
        """Whether the log of an open database was removed or replaced, so that others see something else than this process."""
        known = self._identity
        if known is None:
            return False
        pairs = zip(_logs(self._file), known[1:], strict=True)
        return any(old not in (None, _UNKNOWN) and _inode(path) not in (old, _UNKNOWN) for path, old in pairs)

    def _take(self) -> sqlite3.Connection:
        with self._ready:
            # Also where this object was made while a fork is prepared: no thread may be in SQLite at a fork.
            while forks_near:
                # Not without end: Ctrl-C in `fork_is_over` may have come before it told of the end.
                self._ready.wait(_LOOK_SECONDS)
            if self._retired:
                raise IndexReplacedError(f"the index {self._file.parent} is being replaced")
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
                return  # closed meanwhile, or another process's
            self._lent.remove(connection)
            if not self._closed:
                self._idle.append(connection)
            else:
                _close(connection)
            self._ready.notify_all()

    def before_fork(self, until: float) -> None:
        """A fork is near, so that none are lent any more: close those that no thread uses; wait until `until` for those that are lent."""
        if not self._ready.acquire(timeout=max(0.0, until - time.monotonic())):
            return
        try:
            own = 0 if self.mine is None else 1
            self._ready.wait_for(lambda: len(self._lent) <= own, timeout=max(0.0, until - time.monotonic()))
            idle, self._idle = self._idle, []
            if not self._lent and not self._closed and self._identity is not None:
                # SQLite removes the logs with the last connection that is closed. Until one is made again, none is missed.
                self._identity = (self._identity[0], None, None)
                self._let_go = True
            # With the lock held, so that another thread's fork waits for it.
            for connection in idle:
                _close(connection)
        finally:
            self._ready.release()

    def after_fork(self) -> None:
        """A fork is over, in the process that forked: if no other one is near, connections are lent again."""
        with self._ready:
            self._ready.notify_all()

    def in_child(self) -> None:
        """Begin without any connection, in a process that was just forked off."""
        self._ready = threading.Condition()
        for connection in self._idle + self._lent:
            # Kept for ever: to close one here would write to files that the parent has open.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))
        self._idle, self._lent, self._identity = [], [], None


_UNKNOWN = -1
_all: weakref.WeakSet[Connections] = weakref.WeakSet()
_guard = threading.RLock()
forks_near: list[None] = []
"""As long as the number of threads that are about to fork. Several may be at once, and then the first one's end is not yet the last one's."""


def _logs(file: Path) -> tuple[Path, Path]:
    return file.with_name(f"{file.name}-wal"), file.with_name(f"{file.name}-shm")


def _inode(path: Path) -> int | None:
    """What tells a file that somebody has open from another one that takes its name; None if there is none."""
    try:
        return path.stat().st_ino
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError:
        return _UNKNOWN  # not to be had now; what is open may still serve


def _close(connection: sqlite3.Connection) -> None:
    with contextlib.suppress(sqlite3.Error):
        connection.close()


def _before_fork() -> None:
    """This thread is about to fork: connections are closed."""
    until = time.monotonic() + FORK_SECONDS
    for each in _every():
        each.before_fork(until)


def fork_is_over() -> None:
    """This thread has forked, in the process that did: if no other one is about to, connections are lent again."""
    for each in _every():
        each.after_fork()


def _every() -> list[Connections]:
    with _guard:
        return list(_all)


def _in_child() -> None:
    global _guard
    _guard = threading.RLock()
    for each in list(_all):
        each.in_child()


# The list's own methods, which Ctrl-C can't cut off as it can a function: a fork that was counted and is never taken off again would keep all
# threads waiting for ever. Before a fork, what was registered last comes first, and behind it last.
os.register_at_fork(after_in_parent=forks_near.pop, after_in_child=forks_near.clear)
os.register_at_fork(before=_before_fork, after_in_parent=fork_is_over, after_in_child=_in_child)
os.register_at_fork(before=partial(forks_near.append, None))
