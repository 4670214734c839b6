"""A disk that fails: the calls by which the store reads and writes its files, with faults."""

from __future__ import annotations

import errno
import io
import os
import random
import signal
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from cachetune_store.database import Database

READS = ("open", "preadv", "stat")
WRITES = ("create", "write", "fsync", "replace", "unlink", "mkdir")
EVERYTHING = (*READS, "scandir", "lstat", *WRITES, "link", "index")
"""Also what SQLite is asked to do for the index."""
_OF_SQLITE = {
    "ENOSPC": "database or disk is full",
    "EROFS": "attempt to write a readonly database",
    "EACCES": "unable to open database file",
    "EMFILE": "unable to open database file",
}


@dataclass
class Fault:
    """What goes wrong, and how often.

    Attributes:
        kind: name of an errno ("EIO"), or "short" (a read gives less than was asked for, as it may), "garbage" (a read gives
            wrong bytes), "cut" (a read ends early, as if the file did), "slow" (a call takes `seconds`), "stuck" (a call
            doesn't return before the fault is over) or "killed" (the process is, by SIGKILL, before the call; of a write, the first half
            is made).
        calls: which calls.
        chance: of each call to fail.
        after: calls that go well first.
        count: most calls that fail; None for no limit.
    """

    kind: str
    calls: tuple[str, ...]
    chance: float = 1.0
    after: int = 0
    count: int | None = None
    seconds: float = 0.0
    seed: int = 0
    met: int = field(default=0, init=False)
    seen: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._rng = random.Random(self.seed)
        self._over = threading.Event()
        self.struck = ""
        self._lock = threading.Lock()

    def strikes(self, name: str) -> bool:
        """Whether this call is to fail."""
        with self._lock:
            if name not in self.calls or self._over.is_set():
                return False
            self.seen += 1
            if self.seen <= self.after or (self.count is not None and self.met >= self.count):
                return False
            hit = self._rng.random() < self.chance
            self.met += hit
            if hit:
                self.struck = name
            return hit

    def error(self) -> OSError:
        """The error of a kind that is an errno."""
        number = getattr(errno, self.kind)
        return OSError(number, os.strerror(number))

    def error_of_sqlite(self) -> sqlite3.Error:
        """What SQLite says of such an error."""
        return sqlite3.OperationalError(_OF_SQLITE.get(self.kind, "disk I/O error"))

    def wait(self) -> None:
        """Wait as the fault says: some time, or until it ends."""
        self._over.wait(self.seconds if self.kind == "slow" else None)

    def end(self) -> None:
        """End the fault, and let waiting calls go on."""
        self._over.set()


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def faulty_disk(folder: Path, fault: Fault) -> Iterator[Fault]:
    """Have calls on files below `folder` fail, in all threads of this process.

    SQLite makes its calls itself. So "index" stands for each statement that it is given for the index.
    """
    below = str(folder)

    def concerns(target: Any) -> bool:
        try:
            path = Path(f"/proc/self/fd/{target}").readlink() if isinstance(target, int) else os.fspath(target)
        except (OSError, TypeError):
            return False
        return str(path).startswith(below)

    def strikes(name: str, target: Any) -> bool:
        if not concerns(target) or not fault.strikes(name):
            return False
        if fault.kind in ("slow", "stuck"):
            fault.wait()
            return False
        if fault.kind == "killed" and name != "write":
            _die()
        return True

    def plain(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(target: Any, *args: Any, **kwargs: Any) -> Any:
            if strikes(name, target):
                if fault.kind == "killed":
                    real(target, args[0][: len(args[0]) // 2])
                    _die()
                raise fault.error()
            return real(target, *args, **kwargs)

        return call

    def opening(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(target: Any, flags: int = os.O_RDONLY, *args: Any, **kwargs: Any) -> Any:
            creates = isinstance(flags, int) and flags & os.O_CREAT
            if strikes("create" if creates else "open", target):
                raise fault.error()
            return real(target, flags, *args, **kwargs)

        return call

    def reading(real: Callable[..., int]) -> Callable[..., int]:
        def call(fd: int, buffers: list[memoryview], position: int) -> int:
            if not strikes("preadv", fd):
                return real(fd, buffers, position)
            (area,) = buffers
            if fault.kind == "short":
                return real(fd, [area[: max(1, len(area) // 4096 // 2) * 4096]], position)
            if fault.kind == "cut":
                return 0
            if fault.kind == "garbage":
                count = real(fd, buffers, position)
                if count:
                    area[(position // 7) % count] ^= 0x10
                return count
            raise fault.error()

        return call

    class Statements:
        """A connection to the index, whose statements fail."""

        def __init__(self, connection: sqlite3.Connection) -> None:
            self._connection = connection

        def execute(self, *args: Any) -> sqlite3.Cursor:
            if fault.strikes("index"):
                if fault.kind == "killed":
                    _die()
                raise fault.error_of_sqlite()
            return self._connection.execute(*args)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._connection, name)

    connection = Database.__dict__["_con"].fget
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(Database, "_con", property(lambda self: Statements(connection(self)))))
        for name in ("write", "fsync", "replace", "unlink", "mkdir", "stat", "lstat", "scandir", "link"):
            stack.enter_context(mock.patch.object(os, name, plain(name, getattr(os, name))))
        stack.enter_context(mock.patch.object(os, "open", opening(os.open)))
        stack.enter_context(mock.patch.object(os, "preadv", reading(os.preadv)))
        stack.enter_context(mock.patch.object(io, "open", plain("open", io.open)))
        try:
            yield fault
        finally:
            fault.end()
