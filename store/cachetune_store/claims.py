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

from .keys import ChunkKey

__all__ = ["Claim", "Claims", "FileClaims", "MemoryClaims"]

_TAKEN = {errno.EAGAIN, errno.EACCES}


class Claim(ABC):
    """Keys that nobody else claims until close(); a context manager.

    Attributes:
        keys: those of the wanted ones that were free.
    """

    keys: frozenset[ChunkKey]

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

    @abstractmethod
    def claim(self, keys: Iterable[ChunkKey]) -> Claim:
        """Claim those keys that nobody holds; never waits."""


class MemoryClaims(Claims):
    """Claims of the threads of this process."""

    def __init__(self) -> None:
        self.held: set[ChunkKey] = set()
        self.lock = threading.Lock()

    def claim(self, keys: Iterable[ChunkKey]) -> Claim:
        """See Claims."""
        with self.lock:
            free = frozenset(keys) - self.held
            self.held |= free
        return _MemoryClaim(self, free)


class _MemoryClaim(Claim):
    def __init__(self, claims: MemoryClaims, keys: frozenset[ChunkKey]) -> None:
        self._claims, self.keys, self._open = claims, keys, True

    def close(self) -> None:
        if self._open:
            self._open = False
            with self._claims.lock:
                self._claims.held -= self.keys


class FileClaims(Claims):
    """Claims over processes: locks on bytes of one file, a byte a key, which the system takes back when their holder dies.

    They are locks of an open file, not of a process, so that threads keep each other out as well.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def claim(self, keys: Iterable[ChunkKey]) -> Claim:
        """See Claims. Where there are no such locks, every key is free.

        Raises:
            OSError: the file can't be opened.
        """
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            return _FileClaim(fd, frozenset(key for key in keys if _lock(fd, key)))
        except BaseException:
            os.close(fd)
            raise


class _FileClaim(Claim):
    def __init__(self, fd: int, keys: frozenset[ChunkKey]) -> None:
        self._fd, self.keys = fd, keys

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _lock(fd: int, key: ChunkKey) -> bool:
    if not hasattr(fcntl, "F_OFD_SETLK"):
        return True
    # struct flock: type, whence, start, length, pid (which must be 0). The file's length doesn't matter.
    byte = int(key.digest[:15], 16)
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
    except OSError as error:
        return error.errno not in _TAKEN
    return True
