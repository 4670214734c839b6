"""The index of a store on disk: a diskcache that holds only JSON."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import diskcache

from .database import Database, JsonDisk
from .errors import IndexDamagedError, IndexReplacedError, StoreError, StoreFullError, StoreLockedError, StorePathError
from .files import MORE_DESCRIPTORS, descriptors_used_up, explain
from .index import COMPLETE, KEPT, Index
from .kept import KeptRecords
from .locks import Wait, locked
from .plainfiles import kind_of, remove_any
from .printing import shown
from .records import checked
from .seals import CHECKSUMS, Seal

__all__ = ["DiskIndex", "JsonDisk"]

_FILES = ("cache.db", "cache.db-wal", "cache.db-shm", "cache.db-journal")
_UNUSABLE = ("unable to open", "readonly", "disk I/O")
"""What SQLite says of a disk that fails or refuses, and of a database that was replaced by another process."""
_Result = TypeVar("_Result")


class DiskIndex(Index):
    """An index in a directory, shared by threads and processes. `seal` makes and checks the sums of its records.

    When another process replaces the database, to rebuild it, this object switches to the new one. A database is only replaced while no
    process is in a transaction. Otherwise changes could go into a database that nobody reads any more.
    """

    def __init__(self, directory: Path, seal: Seal = CHECKSUMS) -> None:
        self._directory = directory
        self._seal = seal
        self._gate = directory.with_name(f"{directory.name}.lock")
        self._file = directory / "cache.db"
        self._kept = KeptRecords(directory / "kept.json", seal)
        self._lock = threading.RLock()
        self._depth = 0
        self._filled: Database | None = None
        """The database of which it is known that all records are there."""
        self._filler: int | None = None
        try:
            # Not while another process replaces the database: a file that is made then would be taken away again, with what is written to it.
            with self._gated(shared=True):
                self.database = self._connect()
        except IndexDamagedError:
            with self._gated(shared=False):
                self.database = self._fresh()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """See Index."""
        # Threads of this process wait for each other here. SQLite would let them sleep and try again.
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
        """The outermost transaction. Called with the lock held."""
        with self._translated(), self._gated(shared=True):
            self._follow()
            database = self.database
            with database.lent():
                self._check_filled(database)
                transact = self._patiently(self.begin)
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
                    # A transaction that can be neither committed nor rolled back ends when its connection is closed.
                    self._reconnect()
                    raise
                finally:
                    self._depth -= 1

    def _start_over(self) -> None:
        """Roll back an open transaction by making a new connection.

        Ctrl-C may arrive between any two steps of diskcache. What diskcache then remembers of an open transaction may be wrong.
        """
        self._depth = 0
        with self._gated(shared=True):
            self._reconnect()

    def _reconnect(self) -> None:
        self.database.let_go()
        self._filled = None
        with contextlib.suppress(sqlite3.Error, StoreError):
            self.database = self._connect()

    def get(self, name: str) -> Any:
        """See Index."""
        self._catch_up()
        return self._patiently(lambda: self._get(name))

    def _get(self, name: str) -> Any:
        database = self.database
        with database.lent():
            if name != COMPLETE:
                self._check_filled(database)
            return self._record(database, name)

    def _record(self, database: Database, name: str) -> Any:
        """A record of a database, filled or not."""
        with database.lent():
            found = database.get(name)
        if found is None:
            return None
        if found[0] != name:
            raise IndexDamagedError(f"the index holds the record of {shown(found[0])} under {shown(name)}")
        return checked(name, found[1])

    def set(self, name: str, record: Any) -> None:
        """See Index."""
        with self.transaction():
            self.database.set(name, record)

    def delete(self, name: str) -> bool:
        """See Index."""
        with self.transaction():
            return bool(self.database.delete(name))

    def names(self, prefix: str) -> Iterator[str]:
        """See Index."""
        self._catch_up()
        self._patiently(self._see_filled)
        database = self.database
        with self._translated():
            yield from database.names(prefix, lambda: self._check_filled(database))

    def place(self, name: str) -> str:
        """See Index."""
        return self._seal.index_name(name)

    def count(self, prefix: str) -> int:
        """See Index."""
        self._catch_up()
        return self._patiently(lambda: self._count(prefix))

    def _count(self, prefix: str) -> int:
        database = self.database
        with database.lent():
            self._check_filled(database)
            return database.count_of(prefix)

    def clear(self) -> None:
        """See Index. A new database replaces the old one, in whatever state that is."""
        # No process adds to what is kept between reading and writing it.
        with self._lock, self._gated(shared=False):
            if self._directory.is_dir():
                with contextlib.suppress(IndexDamagedError):
                    if self._file.exists():
                        self._follow()
                whole = False
                with contextlib.suppress(StoreError):
                    whole = self._get_translated(COMPLETE) is not None
                try:
                    kept = self._kept.take(self._kept_names, self._get_translated, whole=whole)
                except OSError as error:
                    raise explain(error, self._directory) from error
            else:
                kept = {}
            self.database.retire()
            self._filled = None
            self.database = self._fresh()
            with self._translated(), self.database.lent():
                for name, record in kept.items():
                    self.database.set(name, record)
            self._kept.drop()

    def _kept_names(self) -> Iterator[str]:
        with self._translated():
            for prefix in KEPT:
                yield from self.database.names(prefix)

    def _get_translated(self, name: str) -> Any:
        with self._translated():
            return self._record(self.database, name)

    @contextlib.contextmanager
    def made_anew(self, identity: str) -> Iterator[None]:
        """See Index. Until all records are there, nobody but this thread sees any; if that fails, nobody ever does."""
        self._filler = threading.get_ident()
        try:
            with super().made_anew(identity):
                yield
        finally:
            self._filler = None

    def _see_filled(self) -> None:
        database = self.database
        with database.lent():
            self._check_filled(database)

    def _check_filled(self, database: Database) -> None:
        """See that all records are there. Called with a connection lent, so that it is the one that is read from.

        Raises:
            IndexReplacedError: the index is being made anew, or that was cut short. Records that are not there yet must not count as missing.
        """
        if self._filler == threading.get_ident():
            return
        # If the database may have been replaced, the connection that is lent may be another one's.
        if self._filled is database and not (database.is_let_go() or database.is_replaced()):
            return
        if self._record(database, COMPLETE) is None:
            raise IndexReplacedError(f"the index {self._directory} is not filled yet, or filling it was cut short")
        self._filled = database

    def close(self) -> None:
        """See Index."""
        self.database.close_all()

    def _fresh(self) -> Database:
        """A new database in the old one's place. Called with the gate held alone."""
        if not self._directory.is_dir():
            remove_any(self._directory)
        for name in _FILES:
            remove_any(self._directory / name)
        return self._connect()

    def _connect(self) -> Database:
        try:
            self._make_plain()
        except OSError as error:
            raise explain(error, self._directory) from error

        def connected() -> Database:
            try:
                return Database(self._directory, self._seal)
            except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
                raise IndexDamagedError(
                    f"the index {self._directory} is no database of this store ({error})"
                ) from error
            except OSError as error:
                raise explain(error, self._directory) from error

        return self._patiently(connected)

    def _make_plain(self) -> None:
        """Make the directory and the database's file if they are missing. Nothing else may have their names."""
        try:
            self._directory.mkdir(mode=0o700)
        except FileExistsError:
            if not self._directory.is_dir():
                raise IndexDamagedError(f"{self._directory} is no directory") from None
        for name in _FILES:
            with contextlib.suppress(FileNotFoundError):
                mode = (self._directory / name).lstat().st_mode
                if not stat.S_ISREG(mode):
                    raise IndexDamagedError(f"{self._directory / name} is {kind_of(mode)}, not a plain file")
        _make_private(self._file)

    @contextlib.contextmanager
    def _gated(self, *, shared: bool) -> Iterator[None]:
        """Hold the gate, a lock over all processes. Transactions share it; replacing the database takes it alone."""
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(locked(self._gate, shared=shared))
            except OSError as error:
                raise explain(error, self._gate) from error
            yield

    def _catch_up(self) -> None:
        """Do as `_follow`, unless a transaction is open."""
        if self._is_out_of_date():
            with self._lock:
                if not self._depth:
                    with self._gated(shared=True):
                        self._follow()

    def _follow(self) -> bool:
        """Switch to the database that is in the directory now. Returns whether it was opened anew.

        Raises:
            IndexDamagedError: the log of the open database was removed, or the new database is damaged.
        """
        if not self._is_out_of_date():
            return False
        if not (self.database.is_let_go() or self.database.is_replaced()):
            raise IndexDamagedError(f"the log of the index {self._directory} was removed while it was in use")
        self.database.let_go()
        self._filled = None
        self.database = self._connect()
        return True

    def _is_out_of_date(self) -> bool:
        database = self.database
        return database.is_let_go() or database.is_replaced() or database.has_lost_its_log()

    def _is_replaced(self) -> bool:
        database: Database | None = getattr(self, "database", None)  # none while the first connection is made
        return database is not None and database.is_replaced()

    def begin(self) -> Any:
        """Begin a transaction. diskcache's own way to retry would never end if an error doesn't pass."""
        transact = self.database.transact(retry=False)
        transact.__enter__()
        return transact

    def _patiently(self, action: Callable[[], _Result]) -> _Result:
        """The action's result. It is tried again while the database is busy."""
        wait = None
        while True:
            try:
                with self._translated():
                    return action()
            except _BusyError:
                # The process that writes holds a lock on a byte of this file.
                wait = wait or Wait(self._file.with_name("cache.db-shm"))
                wait.again()

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """Raise errors of SQLite as errors of the store."""
        try:
            yield
        except diskcache.Timeout as error:
            # diskcache reports every failure to begin as a timeout. The real error is its context.
            raise self._error(error.__context__ or error) from error
        except sqlite3.DatabaseError as error:
            raise self._error(error) from error

    def _error(self, cause: BaseException) -> StoreError:
        text = str(cause)
        if "full" in text:
            return StoreFullError(f"no room to write the index {self._directory} ({text}); free space")
        if any(word in text for word in _UNUSABLE) and self._is_replaced():
            return IndexReplacedError(f"the index {self._directory} was replaced while it was in use ({text})")
        if "locked" in text or "busy" in text or isinstance(cause, diskcache.Timeout):
            return _BusyError(f"the index {self._directory} is locked by another process; try again")
        if any(word in text for word in _UNUSABLE):
            advice = "check the disk and its free space" if "disk I/O" in text else "check its permissions"
            if descriptors_used_up():
                advice = MORE_DESCRIPTORS
            return StorePathError(f"can't use the index {self._directory} ({text}); {advice}")
        return IndexDamagedError(f"the index {self._directory} is damaged ({text}); call rebuild_index()")


def _make_private(file: Path) -> None:
    """Make the database's file readable only for its user, also one of an earlier release. SQLite gives its other files the same mode.

    The file is not opened for that, because closing it would drop the locks of all connections that this process has to it.
    """
    try:
        os.mknod(file, stat.S_IFREG | 0o600)
    except FileExistsError:
        with contextlib.suppress(FileNotFoundError):  # replaced by another process just now
            if file.stat().st_mode & 0o077:
                file.chmod(0o600)


class _BusyError(StoreLockedError):
    """Another process holds the database."""
