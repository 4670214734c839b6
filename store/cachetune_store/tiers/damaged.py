"""Damaged files: finding out whether a file is one, and keeping the newest, so that their damage can be examined."""

from __future__ import annotations

import contextlib
import errno
import time
from pathlib import Path

from ..buffers import SlabPool
from ..checking import check_file
from ..errors import DamagedChunkError, StoreKeyError
from ..files import make_directory
from ..keys import ChunkKey
from ..plainfiles import remove_any
from ..rawfile import DirectIO, RawFile, identity_of
from ..seals import Seal

__all__ = ["DamagedFiles", "damaged_file"]

_LIMIT_FILES = 16
_LIMIT_BYTES = 1 << 30
_LOST = {errno.EIO, errno.EBADMSG, errno.EUCLEAN}
"""Errors of reading that mean that the disk or the file system has lost data. Other errors may pass."""


class DamagedFiles:
    """A directory of damaged files: at most the newest 16, and at most 1 GiB (or the disk budget, if that is less)."""

    def __init__(self, directory: Path, *, limit_bytes: int) -> None:
        self._directory = directory
        self._limit_bytes = min(limit_bytes, _LIMIT_BYTES)

    def take(self, path: Path) -> bool:
        """Move `path` here. Returns False if there is no such file."""
        make_directory(self._directory)
        try:
            path.replace(self._directory / f"{time.time_ns():020d}-{path.stem}{path.suffix}")
        except FileNotFoundError:
            return False
        self._trim()
        return True

    def remove(self, name: str) -> None:
        """Delete files that were called `name`, whatever their ending."""
        with contextlib.suppress(FileNotFoundError):
            for path in list(self._directory.iterdir()):
                if f"-{name}." in path.name:
                    remove_any(path)

    def _trim(self) -> None:
        total = 0
        # Names begin with the time, so the newest files come first.
        for count, path in enumerate(sorted(self._directory.iterdir(), reverse=True), start=1):
            try:
                total += path.lstat().st_size
            except FileNotFoundError:
                continue
            if count > _LIMIT_FILES or total > self._limit_bytes:
                remove_any(path)


def damaged_file(
    path: Path, key: ChunkKey, pool: SlabPool, seal: Seal, direct: DirectIO
) -> tuple[int, int, int] | None:
    """The identity of a chunk's file if it is damaged; None if it is good, or can't be read now. All of it is checked.

    Args:
        path: the file.
        key: the chunk that it should hold.
        pool: gives memory to read into.
        seal: checks the sums.
        direct: opens the file.
    """
    try:
        file = RawFile(path, direct)
    except DamagedChunkError:
        with contextlib.suppress(OSError):
            return identity_of(path.lstat())
        return None
    except OSError:
        return None
    try:
        check_file(key, file, pool, seal, full=True)
    except DamagedChunkError:
        return file.identity
    except OSError as error:
        return file.identity if error.errno in _LOST else None
    except StoreKeyError:
        return None
    return None
