"""The index of a directory: diskcache, holding JSON only."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import diskcache
import xxhash

from .errors import IndexDamagedError, IndexReplacedError, StoreError, StoreFullError, StorePathError
from .files import explain, locked
from .index import COMPLETE, Index

__all__ = ["DiskIndex", "JsonDisk"]

_CHECKSUM = 16  # characters
_RAW = 1  # diskcache's mode of values that stand in the database as they are
_BUSY_SECONDS = 60.0
_PATIENCE = 600.0
_Result = TypeVar("_Result")


class JsonDisk(diskcache.Disk):
    """Keys are strings and values JSON text in the database; anything else, pickles above all, is refused unread.

    SQLite has no checksums of its own, so a value stands behind that of its text, [name, record]: a bit that flips in it,
    or a page that takes another one's place, is noticed before it is used.
    """

    def put(self, key: Any) -> tuple[Any, bool]:
        """Key to database."""
        if type(key) is not str:
            raise TypeError(f"index names are strings, not {key!r}")
        return key, True

    def get(self, key: Any, raw: Any) -> Any:
        """Key from database."""
        if not raw or type(key) is not str:
            raise IndexDamagedError("the index holds a name that is no string; it is not used")
        return key

    def store(self, value: Any, read: bool, key: Any = None) -> tuple[int, int, None, str]:
        """Value to database."""
        if read:
            raise TypeError("the index stores no files")
        text = json.dumps([key, value], separators=(",", ":"))
        return 0, _RAW, None, _checksum(text) + text

    def fetch(self, mode: int, filename: str | None, value: Any, read: bool) -> Any:
        """Name and value from database."""
        if mode != _RAW or filename is not None or type(value) is not str:
            raise IndexDamagedError("the index holds a record that is not JSON (a pickle or a file); it is not read")
        text = value[_CHECKSUM:]
        if value[:_CHECKSUM] != _checksum(text):
            raise IndexDamagedError("the index holds a record that fails its checksum")
        return json.loads(text)


def _checksum(text: str) -> str:
    # A damaged database may hand out what is no UTF-8, with surrogates in place of the odd bytes.
    return str(xxhash.xxh3_64_hexdigest(text.encode("utf-8", "surrogatepass")))


class DiskIndex(Index):
    """Index in a directory, shared by threads and processes.

    If another process replaces the database (a rebuild), this one follows it. A database is replaced only while no
    process is in a transaction, so that no change is made to one that nobody will read again.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._gate = directory.with_name(f"{directory.name}.lock")
        self._file = directory / "cache.db"
        self._lock = threading.RLock()
        self._depth = 0
        self._cache, self._inode = self._open()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """See Index."""
        # Threads of this process queue here; in sqlite they would sleep and poll.
        with self._lock:
            if self._depth:
                yield
                return
            try:
                yield from self._transaction()
            except (Exception, GeneratorExit):
                raise
            except BaseException:
                self._start_over()
                raise

    def _transaction(self) -> Iterator[None]:
        """The outermost transaction; the lock is held."""
        with self._translated(), self._gated(shared=True):
            if self._follow() and self._cache.get(COMPLETE) is None:
                raise IndexReplacedError(f"the index {self._directory} was replaced and is not filled yet")
            transact = self._patiently(self._begin)
            self._depth += 1
            try:
                try:
                    yield
                except BaseException:
                    if not transact.__exit__(*sys.exc_info()):
                        raise
                else:
                    transact.__exit__(None, None, None)
            except sqlite3.Error:
                # What could neither be committed nor rolled back ends with its connection; the next use makes a new one.
                with contextlib.suppress(sqlite3.Error):
                    self._cache.close()
                raise
            finally:
                self._depth -= 1

    def _start_over(self) -> None:
        """Roll back whatever is open, on a new connection.

        Ctrl-C may come between any two steps of diskcache, which then takes for open what is not, or the other way round.
        """
        self._depth = 0
        with contextlib.suppress(sqlite3.Error, StoreError):
            self._cache.close()
            self._cache, self._inode = self._connect()

    def get(self, name: str) -> Any:
        """See Index."""
        self._catch_up()
        found = self._patiently(lambda: self._cache.get(name))
        if found is None:
            return None
        if found[0] != name:
            raise IndexDamagedError(f"the index holds the record of {found[0]!r} under {name!r}")
        return found[1]

    def set(self, name: str, record: Any) -> None:
        """See Index."""
        with self.transaction():
            self._cache.set(name, record)

    def delete(self, name: str) -> bool:
        """See Index."""
        with self.transaction():
            return bool(self._cache.delete(name))

    def names(self, prefix: str) -> Iterator[str]:
        """See Index."""
        self._catch_up()
        with self._translated():
            # iterkeys() goes through the names in order, so the range ends at the first name past it.
            for name in self._cache.iterkeys():
                if name.startswith(prefix):
                    yield name
                elif name > prefix:
                    return

    def clear(self) -> None:
        """See Index. A new database takes the old one's place, whatever state that is in."""
        with self._lock, self._gated(shared=False):
            with contextlib.suppress(Exception):
                self._cache.close()
            self._cache, self._inode = self._fresh()

    def close(self) -> None:
        """See Index."""
        with contextlib.suppress(sqlite3.Error):
            self._cache.close()

    def _open(self) -> tuple[Any, int]:
        try:
            with self._translated():
                return self._connect()
        except IndexDamagedError:
            return self._fresh()

    def _fresh(self) -> tuple[Any, int]:
        shutil.rmtree(self._directory, ignore_errors=True)
        with self._translated():
            return self._connect()

    def _connect(self) -> tuple[Any, int]:
        try:
            self._directory.mkdir(mode=0o700, exist_ok=True)
            _make_private(self._file)
        except OSError as error:
            raise explain(error, self._directory) from error
        # Nothing of diskcache's own housekeeping: what goes, and when, is the store's to decide.
        cache = diskcache.Cache(
            str(self._directory),
            timeout=_BUSY_SECONDS,
            disk=JsonDisk,
            disk_min_file_size=1 << 40,
            eviction_policy="none",
            size_limit=1 << 62,
            cull_limit=0,
            statistics=0,
            tag_index=0,
            # A page that can't be read from a mapped file would kill the process instead of raising an error.
            sqlite_mmap_size=0,
        )
        try:
            return cache, self._file.stat().st_ino
        except OSError as error:
            raise explain(error, self._file) from error

    @contextlib.contextmanager
    def _gated(self, *, shared: bool) -> Iterator[None]:
        """Shared by all transactions, over processes; alone while a database takes another one's place."""
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(locked(self._gate, shared=shared))
            except OSError as error:
                raise explain(error, self._gate) from error
            yield

    def _catch_up(self) -> None:
        """As `_follow`, outside of a transaction."""
        if self._is_replaced():
            with self._lock:
                if not self._depth:
                    with self._gated(shared=True):
                        self._follow()

    def _follow(self) -> bool:
        """Move to the database that stands in the directory now; whether that is another one."""
        if not self._is_replaced():
            return False
        with contextlib.suppress(Exception):
            self._cache.close()
        self._cache, self._inode = self._open()
        return True

    def _is_replaced(self) -> bool:
        try:
            return self._file.stat().st_ino != self._inode
        except FileNotFoundError:
            return True
        except OSError:
            return False  # not to be had now; what is open may still serve

    def _begin(self) -> Any:
        """A transaction that has begun. diskcache's own retry would spin for ever on errors that don't pass."""
        transact = self._cache.transact(retry=False)
        transact.__enter__()
        return transact

    def _patiently(self, action: Callable[[], _Result]) -> _Result:
        """The action's result; a database that is only busy is waited for."""
        give_up = time.monotonic() + _PATIENCE
        while True:
            try:
                with self._translated():
                    return action()
            except _BusyError:
                if time.monotonic() > give_up:
                    raise
                time.sleep(0.05)

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """Errors of sqlite as errors of the store."""
        try:
            yield
        except diskcache.Timeout as error:
            # diskcache reports every failure to begin as a timeout; what it was is the context.
            raise self._error(error.__context__ or error) from error
        except sqlite3.DatabaseError as error:
            raise self._error(error) from error

    def _error(self, cause: BaseException) -> StoreError:
        text = str(cause)
        if "full" in text:
            return StoreFullError(f"no room to write the index {self._directory} ({text}); free space")
        if "locked" in text or "busy" in text or isinstance(cause, diskcache.Timeout):
            return _BusyError(f"the index {self._directory} is locked by another process; try again")
        if any(word in text for word in ("unable to open", "readonly", "disk I/O")):
            return StorePathError(f"can't use the index {self._directory} ({text}); check its permissions")
        return IndexDamagedError(f"the index {self._directory} is damaged ({text}); call rebuild_index()")


def _make_private(file: Path) -> None:
    """Make the database's file, or an older one of it, its user's alone; sqlite gives the files beside it the same mode.

    Without opening it: to close it again would drop the locks of every connection that this process has to it.
    """
    try:
        os.mknod(file, stat.S_IFREG | 0o600)
    except FileExistsError:
        with contextlib.suppress(FileNotFoundError):  # replaced by another process just now
            if file.stat().st_mode & 0o077:
                file.chmod(0o600)


class _BusyError(StoreError):
    """Another process holds the database."""
