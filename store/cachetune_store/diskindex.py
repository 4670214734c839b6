"""The index of a directory: diskcache, holding JSON only."""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import diskcache

from .errors import IndexDamagedError, StoreError, StoreFullError, StorePathError
from .index import Index

__all__ = ["DiskIndex", "JsonDisk"]

_RAW = 1  # diskcache's mode of values that stand in the database as they are
_BUSY_SECONDS = 60.0
_PATIENCE = 600.0
_Result = TypeVar("_Result")


class JsonDisk(diskcache.Disk):
    """Keys are strings and values JSON text in the database; anything else, pickles above all, is refused unread."""

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
        return 0, _RAW, None, json.dumps(value, separators=(",", ":"))

    def fetch(self, mode: int, filename: str | None, value: Any, read: bool) -> Any:
        """Value from database."""
        if mode != _RAW or filename is not None or type(value) is not str:
            raise IndexDamagedError("the index holds a record that is not JSON (a pickle or a file); it is not read")
        try:
            return json.loads(value)
        except (ValueError, RecursionError) as error:
            raise IndexDamagedError(f"the index holds a record that is not JSON ({error})") from error


class DiskIndex(Index):
    """Index in a directory, shared by threads and processes.

    If another process replaces the database (a rebuild), this one follows it at its next transaction.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
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
            self._follow()
            transact = self._patiently(self._begin)
            self._depth += 1
            try:
                with self._translated():
                    try:
                        yield
                    except BaseException:
                        if not transact.__exit__(*sys.exc_info()):
                            raise
                    else:
                        transact.__exit__(None, None, None)
            finally:
                self._depth -= 1

    def get(self, name: str) -> Any:
        """See Index."""
        return self._patiently(lambda: self._cache.get(name))

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
        with self._translated():
            # iterkeys() goes through the names in order, so the range ends at the first name past it.
            for name in self._cache.iterkeys():
                if name.startswith(prefix):
                    yield name
                elif name > prefix:
                    return

    def clear(self) -> None:
        """See Index. A new database takes the old one's place, whatever state that is in."""
        with self._lock:
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
        self._directory.mkdir(mode=0o700, exist_ok=True)
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
        )
        return cache, self._file.stat().st_ino

    def _follow(self) -> None:
        """Move to the database that stands in the directory now."""
        try:
            inode = self._file.stat().st_ino
        except OSError:
            inode = -1
        if inode != self._inode:
            with contextlib.suppress(Exception):
                self._cache.close()
            self._cache, self._inode = self._open()

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


class _BusyError(StoreError):
    """Another process holds the database."""
