"""Claims: who computes a chunk just now, so that no two threads or processes compute the same one.

A claim is advice, and costs a chunk nothing but its turn: whoever ignores it, or can't get it because the file system has no
locks, does work twice and nothing wrong.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

from .holders import Holders, holders_of_bytes
from .keys import ChunkKey
from .locks import OwnDescriptor, open_lock

__all__ = ["Claim", "Claims", "FileClaims", "MemoryClaims"]

_TAKEN = {errno.EAGAIN, errno.EACCES}


class Claim(ABC):
    """Keys that nobody else claims until close(); a context manager.

    Attributes:
        keys: those of the wanted ones that were free.
        own: those that this very thread has claimed already, and so would wait for in vain.
    """

    keys: frozenset[ChunkKey]
    own: frozenset[ChunkKey]

    @abstractmethod
    def close(self) -> None:
        """Let go of the keys. May be called again."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # One that nobody came to hold, because its maker was left behind, must not keep its keys for ever.
        with contextlib.suppress(Exception):
            self.close()


class Claims(ABC):
    """All claims on a store."""

    def __init__(self) -> None:
        self._threads = threading.local()

    @abstractmethod
    def claim(self, keys: Iterable[ChunkKey]) -> Claim:
        """Claim those keys that nobody holds; never waits."""

    def holders(self, keys: Iterable[ChunkKey]) -> Holders:
        """Which other processes hold some of these keys. It takes a while: for log lines, and not for each try."""
        return Holders()

    @property
    def mine(self) -> set[ChunkKey]:
        """What this thread has claimed."""
        held: set[ChunkKey] | None = getattr(self._threads, "held", None)
        if held is None:
            held = self._threads.held = set()
        return held


class MemoryClaims(Claims):
    """Claims of the threads of this process."""

    def __init__(self) -> None:
        super().__init__()
        self.held: set[ChunkKey] = set()
        self.lock = threading.Lock()

    def claim(self, keys: Iterable[ChunkKey]) -> Claim:
        """See Claims."""
        wanted = frozenset(keys)
        with self.lock:
            free = wanted - self.held
            self.held |= free
        return _MemoryClaim(self, free, wanted)


class _MemoryClaim(Claim):
    def __init__(self, claims: MemoryClaims, keys: frozenset[ChunkKey], wanted: frozenset[ChunkKey]) -> None:
        self._claims, self.keys, self._open = claims, keys, True
        self._process, self._mine = os.getpid(), claims.mine
        self.own = wanted & self._mine
        self._mine |= keys

    def close(self) -> None:
        # In a process forked off since, a thread that is not there may hold the lock, and nobody waits for the keys.
        if self._open and self._process == os.getpid():
            self._open = False
            self._mine -= self.keys
            with self._claims.lock:
                self._claims.held -= self.keys


class FileClaims(Claims):
    """Claims over processes: locks on bytes of one file, a byte a key, which the system takes back when their holder dies.

    They are locks of an open file, not of a process, so that threads keep each other out as well.

    Raises:
        StorePathError: there is something else than a plain file at `path`.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        open_lock(path).close()

    def claim(self, keys: Iterable[ChunkKey]) -> Claim:
        """See Claims. Where there are no such locks, every key is free.

        Raises:
            OSError: the file can't be opened.
        """
        wanted = frozenset(keys)
        held = open_lock(self._path)
        try:
            return _FileClaim(held, frozenset(key for key in wanted if _lock(held.fd, key)), wanted, self.mine)
        except BaseException:
            held.close()
            raise

    def holders(self, keys: Iterable[ChunkKey]) -> Holders:
        """See Claims."""
        return holders_of_bytes(self._path, {_byte(key) for key in keys})


class _FileClaim(Claim):
    def __init__(
        self, held: OwnDescriptor, keys: frozenset[ChunkKey], wanted: frozenset[ChunkKey], mine: set[ChunkKey]
    ) -> None:
        self._held, self.keys, self._mine = held, keys, mine
        self.own = wanted & mine - keys
        mine |= keys

    def close(self) -> None:
        if self._held.fd >= 0:
            self._mine -= self.keys
            self._held.close()


def _lock(fd: int, key: ChunkKey) -> bool:
    if not hasattr(fcntl, "F_OFD_SETLK"):
        return True
    # struct flock: type, whence, start, length, pid (which must be 0). The file's length doesn't matter.
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, _byte(key), 1, 0))
    except OSError as error:
        return error.errno not in _TAKEN
    return True


def _byte(key: ChunkKey) -> int:
    """The place of the byte that stands for a key."""
    return int(key.digest[:15], 16)
