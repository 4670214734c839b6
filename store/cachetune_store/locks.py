"""Locks on files, between processes and threads. Waiting for one always ends, and a forked process doesn't inherit any."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from .errors import StoreLockedError
from .holders import holders_of
from .plainfiles import not_plain

__all__ = ["OwnDescriptor", "Wait", "locked", "open_lock"]

_SOON = 1.0
"""Seconds to wait for a lock before the log says so."""
_STOPPED = 10.0
_UNKNOWN = 60.0
_AT_WORK = 600.0
"""Seconds to wait for a lock whose holder is stopped, is not known, or is running."""
_TELL_AGAIN = 30.0
_NAPS = (0.001, 0.05)
_WRONG_KIND = {errno.EISDIR, errno.ELOOP, errno.ENXIO, errno.ENODEV}

_log = logging.getLogger(__name__)
_open: set[OwnDescriptor] = set()


class OwnDescriptor:
    """A file descriptor that only this process keeps: a process that is forked off closes its copy at once.

    A lock belongs to the open file, which a forked process shares. With a copy left open, the lock would stay held as long as the forked
    process lives, even after the process that took it has released it or died.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        _open.add(self)

    def close(self) -> None:
        """Close it, which releases its lock. May be called again."""
        _open.discard(self)
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


def _close_inherited() -> None:
    for held in list(_open):
        with contextlib.suppress(OSError):
            held.close()


os.register_at_fork(after_in_child=_close_inherited)


def open_lock(path: Path, flags: int = os.O_CREAT) -> OwnDescriptor:
    """Open the file `path` to lock it, and make it if it is missing. Never waits.

    Raises:
        StorePathError: it is not a plain file.
        OSError: it can't be opened.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | flags, 0o600)
    except OSError as error:
        if error.errno in _WRONG_KIND:
            raise not_plain(path) from error
        raise
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise not_plain(path)
    return OwnDescriptor(fd)


def _try_lock(fd: int, *, shared: bool) -> bool:
    """Try to lock an open file. Returns False if somebody else has it locked. If the file system has no locks, returns True."""
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


@contextlib.contextmanager
def locked(path: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold an advisory lock on the file `path` (made if missing), across processes and threads.

    If the file system has no locks, nothing is locked.

    Raises:
        StorePathError: `path` is not a plain file.
        StoreLockedError: another process doesn't release the lock.
        OSError: it can't be opened.
    """
    held = open_lock(path)
    try:
        wait = None
        while not _try_lock(held.fd, shared=shared):
            wait = wait or Wait(path)
            wait.again()
        yield
    finally:
        held.close()


class Wait:
    """Waiting for a lock that somebody else holds. The log says so, and the waiting ends at some time.

    Args:
        path: the locked file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._since = time.monotonic()
        self._look = self._since + _SOON
        self._tell = self._look
        self._nap, self._longest_nap = _NAPS

    def again(self) -> None:
        """Wait a moment before the next try.

        Raises:
            StoreLockedError: the lock was held for too long.
        """
        now = time.monotonic()
        waited = now - self._since
        if now >= self._look:
            holders = holders_of(self._path)
            if now >= self._tell:
                _log.warning("waiting for the lock %s, which is held by %s", self._path, holders)
                self._tell = now + _TELL_AGAIN
            if waited > (_STOPPED if holders.stopped else _AT_WORK if holders.pids else _UNKNOWN):
                what = (
                    f"continue it (kill -CONT {holders.stopped[0]}) or end it"
                    if holders.stopped
                    else "wait for it or end it"
                )
                raise StoreLockedError(
                    f"the lock {self._path} has been held for {waited:.0f} s by {holders}: {what}, and try again"
                )
            self._look = now + _SOON
        time.sleep(self._nap)
        self._nap = min(2 * self._nap, self._longest_nap)
