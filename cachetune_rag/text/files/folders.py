"""Finds and opens regular files only, so that no pipe, device or link holds up or ends a run."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from cachetune_rag.checking.escaping import visible_line
from cachetune_rag.text.files.left_out import LeftOut
from cachetune_rag.text.files.readers import CorpusError, reader_for

# Otherwise opening a pipe would wait for its other end. Opening some devices has effects of its own.
_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY


def open_file(path: Path) -> BinaryIO:
    """Open a regular file for reading.

    Raises:
        CorpusError: it is not a regular file, or can't be opened.
    """
    refuse_others(status(path), path)
    try:
        stream = os.fdopen(os.open(path, _FLAGS), "rb")
    except OSError as error:
        raise CorpusError(why(error, path)) from error
    try:
        refuse_others(os.fstat(stream.fileno()), path)  # it may have been replaced meanwhile
    except BaseException:
        stream.close()
        raise
    return stream


def status(path: Path) -> os.stat_result:
    """The status (`os.stat`) of the file or folder at a path. Links are followed.

    Raises:
        CorpusError: there is nothing, or its status can't be read.
    """
    try:
        return path.stat()
    except (OSError, ValueError) as error:
        raise CorpusError(why(error, path)) from error


def refuse_others(info: os.stat_result, path: Path) -> None:
    """Refuse anything that isn't a regular file.

    Raises:
        CorpusError: names it.
    """
    if not stat.S_ISREG(info.st_mode):
        raise CorpusError(f"{visible_line(path)} is no regular file: give a text file.")


def why(error: OSError | ValueError, path: Path) -> str:
    """Why a file can't be read, and what to do."""
    name = visible_line(path)
    code = error.errno if isinstance(error, OSError) else None
    if code == errno.ELOOP:
        return f"{name} is a link that leads back to itself: remove it, or point it to a file."
    if code == errno.ENOENT:
        if path.is_symlink():
            return f"{name} is a link to something that does not exist: remove it, or point it to a file."
        return f"{name} does not exist: check the path."
    reason = error.strerror if isinstance(error, OSError) else str(error)
    hint = " Check its permissions." if code in (errno.EACCES, errno.EPERM) else ""
    return f"{name} can't be read: {reason}.{hint}"


def walk(folder: Path, left_out: LeftOut) -> Iterator[Path]:
    """The regular files below a folder that have a reader, ordered by name. All others are added to `left_out`.

    Raises:
        CorpusError: the folder itself can't be searched.
    """
    # Without recursion, because folders may be nested deeper than Python allows calls to be.
    open_folders = [iter(_entries(folder))]
    seen = {_identity(folder)}
    while open_folders:
        entry = next(open_folders[-1], None)
        if entry is None:
            open_folders.pop()
            continue
        path = Path(entry.path)
        if entry.name.startswith("."):
            left_out.hidden += 1
            continue
        try:
            info = entry.stat()
            if stat.S_ISDIR(info.st_mode):
                if entry.is_symlink():
                    left_out.linked_folders += 1
                elif (identity := (info.st_dev, info.st_ino)) in seen:
                    left_out.failed.append(
                        (path, f"{visible_line(path)} holds itself: a folder above is mounted there.")
                    )
                else:
                    seen.add(identity)
                    open_folders.append(iter(_entries(path)))
                continue
            reader = reader_for(path)
            if stat.S_ISREG(info.st_mode) and reader is None:
                left_out.add_unread(path)
                continue
            refuse_others(info, path)
        except OSError as error:
            left_out.failed.append((path, why(error, path)))
            continue
        except CorpusError as error:
            left_out.failed.append((path, str(error)))
            continue
        if reader is not None and reader.missing:
            left_out.add_needing(path, reader)
        else:
            yield path


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            return sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise CorpusError(
            f"{visible_line(folder)} can't be searched: {error.strerror}. Check its permissions."
        ) from error


def _identity(folder: Path) -> tuple[int, int]:
    info = status(folder)
    return info.st_dev, info.st_ino
