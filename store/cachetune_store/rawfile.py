"""Reading a file at given positions, and around the page cache (direct I/O) where the file system allows it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from pathlib import Path

from .buffers import PAGE, SlabPool, memory_of, round_up
from .errors import DamagedChunkError
from .plainfiles import UnfitFileError, open_plain

__all__ = ["DirectIO", "RawFile", "identity_of"]

_HEAD_GUESS = 32 << 10
# Errors of file systems that have no direct I/O, or need another alignment.
_NOT_DIRECT = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}


def identity_of(status: os.stat_result) -> tuple[int, int, int]:
    """Numbers by which a file is told from a later one of the same name."""
    return status.st_dev, status.st_ino, status.st_mtime_ns


class DirectIO:
    """Whether files are opened for direct I/O. It turns itself off where that doesn't work.

    Args:
        wanted: False: never. True or None: if the file system supports it.
    """

    def __init__(self, wanted: bool | None) -> None:
        self.active = wanted is not False and hasattr(os, "O_DIRECT")

    def open(self, path: Path | str) -> int:
        """A descriptor of the plain file `path`, for direct I/O if possible.

        Raises:
            DamagedChunkError: it is not a plain file.
            OSError: it can't be opened.
        """
        try:
            return self._open(path)
        except UnfitFileError as error:
            raise DamagedChunkError(str(error)) from error

    def _open(self, path: Path | str) -> int:
        if self.active:
            try:
                return open_plain(path, os.O_DIRECT)
            except OSError as error:
                if error.errno not in _NOT_DIRECT:
                    raise
                self.active = False
        return open_plain(path)


class RawFile:
    """An open file. It stays readable after its name is removed, so an open chunk outlives its eviction."""

    def __init__(
        self, path: Path | str, direct: DirectIO, head: int = _HEAD_GUESS, memory: SlabPool | None = None
    ) -> None:
        """Open it.

        Args:
            path: path of the file.
            direct: opens it.
            head: the likely length of the file's head. At least so many bytes are read when it is asked for.
            memory: gives the memory that the head is read into. New memory would take as long to touch as to fill.

        Raises:
            DamagedChunkError: it is not a plain file.
            OSError: it can't be opened.
        """
        self._fd = -1
        self._memory = memory or SlabPool(pinned=False, limit=0)
        self._direct, self._guess = direct, max(head, _HEAD_GUESS)
        self._head: memoryview | None = None
        self._fd = direct.open(path)
        status = os.fstat(self._fd)
        self.size = status.st_size
        self.modified = status.st_mtime
        self.changed = status.st_ctime_ns
        self.identity = identity_of(status)

    def head(self, count: int) -> memoryview:
        """At least the first `count` bytes, or the whole file if it is shorter. They are kept until `drop_head`."""
        if self._head is None or len(self._head) < min(count, self.size):
            want = min(round_up(max(count, self._guess)), round_up(self.size))
            area = memory_of(self._memory.allocate(max(want, PAGE)))
            self._head = area[: min(self.read(area[:want], 0), self.size)]
        return self._head

    def drop_head(self) -> None:
        """Give back the memory of `head`."""
        self._head = None

    def read(self, area: memoryview, position: int) -> int:
        """Fill `area` (page-aligned, whole pages) from `position` on. Returns how many bytes were read."""
        done = 0
        while done < len(area) and position + done < self.size:
            try:
                count = os.preadv(self._fd, [area[done:]], position + done)
            except OSError as error:
                if error.errno not in _NOT_DIRECT or not self._direct_off():
                    raise
                continue
            if not count:
                break
            done += count
        return done

    def close(self) -> None:
        """Close the descriptor. May be called again."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def __del__(self) -> None:
        with contextlib.suppress(OSError):
            self.close()

    def _direct_off(self) -> bool:
        """Turn direct I/O off for this descriptor. Returns False if it was off already."""
        flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
        direct = getattr(os, "O_DIRECT", 0)
        if not flags & direct:
            return False
        fcntl.fcntl(self._fd, fcntl.F_SETFL, flags & ~direct)
        self._direct.active = False
        return True
