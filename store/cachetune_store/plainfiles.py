"""Reading files that may be anything: whoever can write to a store's directory may have put a pipe, a link or a device in a
file's place, or something without end. Nothing that isn't a plain file is read, no link is followed, nothing is waited for, and
no more is read than the caller has use for.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from pathlib import Path

from .errors import StorePathError

__all__ = ["UnfitFileError", "kind_of", "not_plain", "open_plain", "read_plain", "remove_any"]

_WRONG_KIND = {errno.ELOOP, errno.ENXIO, errno.ENODEV, errno.EISDIR}
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFLNK: "a link",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class UnfitFileError(ValueError):
    """What stands in a file's place is no plain file, or a longer one than can be meant."""


def kind_of(mode: int) -> str:
    """What a file mode says, in words."""
    return _KINDS.get(stat.S_IFMT(mode), "a plain file")


def open_plain(path: Path | str, flags: int = 0) -> int:
    """A descriptor of the plain file `path`, for reading.

    Raises:
        UnfitFileError: it is something else.
        OSError: it can't be opened.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | flags)
    except OSError as error:
        if error.errno in _WRONG_KIND:
            raise UnfitFileError(f"{path} is {_kind_at(path)}, not a plain file") from error
        raise
    try:
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode):
            raise UnfitFileError(f"{path} is {kind_of(mode)}, not a plain file")
    except BaseException:
        os.close(fd)
        raise
    return fd


def read_plain(path: Path, most: int) -> bytes:
    """The content of the plain file `path`.

    Raises:
        UnfitFileError: it is something else, or longer than `most` bytes.
        OSError: it can't be read.
    """
    with os.fdopen(open_plain(path), "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise UnfitFileError(f"{path} is longer than {most} bytes")
    return content


def not_plain(path: Path) -> StorePathError:
    """The error for something else in the place of a file that must be written to."""
    return StorePathError(f"{path} is {_kind_at(path)}, not a plain file: remove it, and open the store again")


def remove_any(path: Path) -> None:
    """Remove whatever stands at `path`, if anything does; of a link the link.

    Raises:
        OSError: it can't be removed.
    """
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISDIR(path.lstat().st_mode):
            shutil.rmtree(path)
        else:
            path.unlink()


def _kind_at(path: Path | str) -> str:
    try:
        return kind_of(os.lstat(path).st_mode)
    except OSError:
        return "gone or hidden"
