"""Reading files safely. Anybody who can write to a store's directory may replace a file by a pipe, a link, a device or an endless file.

So only plain files are read, links are not followed, nothing is waited for, and no more is read than the caller needs.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from .errors import StorePathError

__all__ = ["UnfitFileError", "files_below", "kind_of", "not_plain", "open_plain", "read_plain", "remove_any"]

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
    """A file is not a plain one, or is longer than such a file can be."""


def kind_of(mode: int) -> str:
    """The kind of a file, in words, from its mode."""
    return _KINDS.get(stat.S_IFMT(mode), "a plain file")


def open_plain(path: Path | str, flags: int = 0) -> int:
    """A descriptor to read the plain file `path`.

    Raises:
        UnfitFileError: it is not a plain file.
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
        UnfitFileError: it is not a plain file, or is longer than `most` bytes.
        OSError: it can't be read.
    """
    with os.fdopen(open_plain(path), "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise UnfitFileError(f"{path} is longer than {most} bytes")
    return content


def files_below(directory: Path, suffix: str) -> Iterator[Path]:
    """What has a name with this ending in a folder of `directory`, of whatever kind it is.

    Path.glob passes over folders that can't be read, so that what lies in them would seem to be gone.

    Raises:
        OSError: a folder can't be read.
    """
    for folder in _entries(directory):
        for entry in _entries(folder.path) if folder.is_dir() else ():
            if entry.name.endswith(suffix):
                yield directory / folder.name / entry.name


def _entries(folder: Path | str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            return list(found)
    except FileNotFoundError:
        return []  # removed meanwhile, or never made


def not_plain(path: Path) -> StorePathError:
    """The error for a file that must be written to and is not a plain one."""
    return StorePathError(f"{path} is {_kind_at(path)}, not a plain file: remove it, and open the store again")


def remove_any(path: Path) -> None:
    """Remove whatever is at `path`, if anything is. Of a link, only the link is removed.

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
