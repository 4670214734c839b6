"""Files that are there whole or not at all, and that survive a crash once written."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from .errors import BudgetError, StoreError, StoreFullError, StorePathError, UnknownDocumentError
from .locks import OwnDescriptor, locked, open_lock

__all__ = [
    "MORE_DESCRIPTORS",
    "TempFiles",
    "descriptors_used_up",
    "explain",
    "make_directory",
    "sync_directory",
    "unreadable",
    "write_all",
    "write_small",
]

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_USED_UP = {errno.EMFILE, errno.ENFILE}
_WRONG_KIND = {errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENXIO}
_FAILING = {errno.EIO, errno.ESTALE, errno.EBADMSG, errno.EUCLEAN, errno.ETIMEDOUT}
_BEFORE_CHANGES = (BudgetError, UnknownDocumentError)
"""Errors that are raised before any file was changed."""
MORE_DESCRIPTORS = "this process has as many files open as it may: close some, or raise the limit (ulimit -n)"
_Buffer = bytes | memoryview


def explain(error: OSError, path: Path | str) -> StoreError:
    """The store's error for an OSError met at `path`."""
    reason = error.strerror or str(error)
    if error.errno in _FULL:
        return StoreFullError(
            f"no room to write {path} ({reason}); free space or lower disk_budget, and try again. What was stored before stays"
        )
    if error.errno in _USED_UP:
        return StorePathError(f"can't use {path} ({reason}); {MORE_DESCRIPTORS}")
    where = error.filename if isinstance(error.filename, str | Path) else path
    if error.errno == errno.ENOENT:
        return StorePathError(
            f"can't use {where} ({reason}): a folder of the store was removed or renamed while it was open, or is a link that leads "
            "nowhere; put it back, or open the store again, which makes what is missing"
        )
    if error.errno in _WRONG_KIND:
        return StorePathError(
            f"can't use {where} ({reason}); remove what stands there, or give the store another directory"
        )
    if error.errno in _FAILING:
        return StorePathError(f"can't use {where} ({reason}); check the disk, and try again")
    if error.errno == errno.ENOMEM:
        return StorePathError(f"can't use {where} ({reason}); free some memory, and try again")
    return StorePathError(f"can't use {where} ({reason}); give the store a directory that this user can write")


def unreadable(error: OSError, path: Path) -> StoreError:
    """The store's error for an OSError met while `path` was read."""
    advice = MORE_DESCRIPTORS if error.errno in _USED_UP else "check the disk and the file's permissions"
    return StorePathError(f"can't read {path} ({error.strerror or error}); {advice}")


def descriptors_used_up() -> bool:
    """Whether this process can't open any more files; SQLite says only that it couldn't open one."""
    try:
        os.close(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        return error.errno in _USED_UP
    return False


def make_directory(path: Path) -> None:
    """Make `path` and its parents, for this user's eyes only; durable."""
    missing = []
    while not path.exists():
        missing.append(path)
        path = path.parent
    for directory in reversed(missing):
        with contextlib.suppress(FileExistsError):
            directory.mkdir(mode=0o700)
        sync_directory(directory.parent)
    if not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))


def sync_directory(path: Path) -> None:
    """Make renames and unlinks in `path` durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_all(fd: int, buffers: Sequence[_Buffer]) -> None:
    """Write all bytes of `buffers` to `fd`, however few a single call takes."""
    for buffer in buffers:
        rest = memoryview(buffer)
        while rest:
            rest = rest[os.write(fd, rest[: 1 << 30]) :]


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _is_abandoned(path: Path) -> bool:
    """Whether a plain file is locked by nobody any more."""
    try:
        held = open_lock(path, 0)
    except (OSError, StoreError):
        return False
    try:
        return _try_lock(held.fd)
    finally:
        held.close()


class TempFiles:
    """A directory of files being written. Each is locked by its writer, so what a dead writer left can be told.

    A store that changes its files keeps a mark here as well until it is closed. A mark without a writer says that files
    and index may differ: a process was killed, or the machine lost its power, between the one and the other; or a change failed
    after some of its files had been changed.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._gate = directory / "gate.lock"
        self._mark: tuple[Path, OwnDescriptor, int] | None = None
        self._mark_lock = threading.Lock()
        self._doubted = False

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Files, and the index with them, are changed inside. The index takes back what a failed change did to it, but files stay changed.

        So if a change fails, the mark stays when the store is closed, and the next process that opens the store compares files and index.
        """
        self.mark()
        try:
            yield
        except _BEFORE_CHANGES:
            raise
        except BaseException:
            self.doubt()
            raise

    def doubt(self) -> None:
        """Files and index may differ: the mark is to stay until they have been compared."""
        self._doubted = True
        self.mark()

    def settle(self) -> None:
        """Files and index have been compared, and agree."""
        self._doubted = False

    def mark(self) -> None:
        """Files are about to be changed. Cheap after the first time; a directory that refuses it is none of its errors."""
        held = self._mark
        if held is not None and held[2] == os.getpid():
            return
        with self._mark_lock, contextlib.suppress(OSError, StoreError):
            path = self.directory / f"{uuid.uuid4().hex}.mark"
            self._mark = path, self._create(path), os.getpid()

    def unmark(self) -> None:
        """The store is closed. Unless there is doubt, all changes are in the index too."""
        if self._doubted:
            self.mark()  # where it could not be made before
        with self._mark_lock:
            held, self._mark = self._mark, None
            if held is not None and held[2] == os.getpid():
                if not self._doubted:
                    with contextlib.suppress(OSError):  # one that stays costs the next opening a comparison
                        held[0].unlink(missing_ok=True)
                held[1].close()

    def dead_marks(self) -> list[Path]:
        """Marks of processes that are gone; unlink them once files and index are in line."""
        with locked(self._gate):
            return [path for path in self.directory.iterdir() if path.suffix == ".mark" and _is_abandoned(path)]

    def write(self, buffers: Sequence[_Buffer], publish: Callable[[Path], None], *, drop_cache: bool = False) -> None:
        """Write a file, make it durable, and hand it to `publish`, which renames it to its place.

        Whatever fails, no temporary file stays. With `drop_cache` its pages don't stay in the page cache either.
        """
        path = self.directory / f"{uuid.uuid4().hex}.tmp"
        held = self._create(path)
        fd = held.fd
        try:
            write_all(fd, buffers)
            os.fsync(fd)
            if drop_cache and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            publish(path)
        finally:
            # Where it can't be deleted now, it is once it has no lock any more: when the store is opened or verified.
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            held.close()

    def clean(self) -> int:
        """Delete the files of writers that are gone; how many there were."""
        removed = 0
        with locked(self._gate):
            for path in list(self.directory.iterdir()):
                if path.suffix == ".tmp" and _is_abandoned(path):
                    path.unlink(missing_ok=True)
                    removed += 1
        return removed

    def _create(self, path: Path) -> OwnDescriptor:
        """A new file that is locked as long as it is open."""
        # The gate is held while the new file has no lock yet; who looks for abandoned files takes it alone.
        with locked(self._gate, shared=True):
            held = open_lock(path, os.O_CREAT | os.O_EXCL)
            _try_lock(held.fd)
        return held


def write_small(temp: TempFiles, path: Path, content: bytes) -> None:
    """Put `content` in the file `path`, atomically and durably."""

    def publish(written: Path) -> None:
        try:
            written.replace(path)
        except IsADirectoryError:
            path.replace(path.with_name(f"{path.name}.{uuid.uuid4().hex}.damaged"))
            written.replace(path)
        sync_directory(path.parent)

    temp.write([content], publish)
