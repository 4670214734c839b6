"""Claims say who is computing a chunk, so that no two threads or processes compute the same one.

A claim is only advice. A process that ignores it, or can't make one because the file system has no locks, computes a chunk that
another computes too. The result is right all the same.
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
from .locks import OwnDescriptor, open_lock

__all__ = ["Claim", "Claims", "FileClaims", "MemoryClaims"]

_TAKEN = {errno.EAGAIN, errno.EACCES}


class Claim(ABC):
    """Keys that nobody else can claim until close(). A context manager.

    Attributes:
        keys: the wanted keys that nobody had claimed.
        own: the wanted keys that this thread has claimed already. It would wait for itself if it waited for them.
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
        # A claim may be made by a call that nobody waits for any more. It must not keep its keys for ever.
        with contextlib.suppress(Exception):
            self.close()


class Claims(ABC):
    """All claims on a store."""

    def __init__(self) -> None:
        self._threads = threading.local()

    @abstractmethod
    def claim(self, keys: Iterable[ChunkKey]) -> Claim:
        """Claim those keys that nobody has claimed. Never waits."""

    @property
    def mine(self) -> set[ChunkKey]:
        """The keys that this thread has claimed."""
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
        # In a process that was forked off since, the lock may stay held for ever, and nobody waits for the keys.
        if self._open and self._process == os.getpid():
            self._open = False
            self._mine -= self.keys
            with self._claims.lock:
                self._claims.held -= self.keys


class FileClaims(Claims):
    """Claims that hold for all processes. Each key stands for a byte of one file, and a claim locks that byte.

    The system releases the locks of a process that dies. The locks belong to an open file rather than to a process, so that they
    also hold between threads.

    Raises:
        StorePathError: `path` is not a plain file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        open_lock(path).close()

    def claim(self, keys: Iterable[ChunkKey]) -> Claim:
        """See Claims. Where the system has no such locks, every key counts as free.

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
    # struct flock: type, whence, start, length, pid (which must be 0). The byte may lie behind the file's end.
    byte = int(key.digest[:15], 16)
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
    except OSError as error:
        return error.errno not in _TAKEN
    return True
