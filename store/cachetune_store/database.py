"""The index's database: diskcache's, holding JSON only, with connections and settings that the store sees to itself."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import diskcache

from .connections import Connections
from .errors import IndexDamagedError
from .seals import CHECKSUMS, Seal

__all__ = ["BUSY_SECONDS", "Database", "JsonDisk", "count_names", "decode", "plain_name", "select_names"]

BUSY_SECONDS = 5.0
"""Seconds that SQLite waits for a lock of another process before it says so."""
_KIND = "index"
_RAW = 1  # diskcache's mode of values that stand in the database as they are
_PAGE = 500
"""Names that are read at a time."""
_SETTINGS: dict[str, Any] = {
    # Nothing of diskcache's own housekeeping: what goes, and when, is the store's to decide.
    **diskcache.DEFAULT_SETTINGS,
    "disk_min_file_size": 1 << 40,
    "eviction_policy": "none",
    "size_limit": 1 << 62,
    "cull_limit": 0,
    "statistics": 0,
    "tag_index": 0,
    # A page that can't be read from a mapped file would kill the process instead of raising an error.
    "sqlite_mmap_size": 0,
}
_OF_DISKCACHE = {*_SETTINGS, "count", "size", "hits", "misses"}
_PER_CONNECTION = ("sqlite_cache_size", "sqlite_mmap_size", "sqlite_synchronous")


class JsonDisk(diskcache.Disk):
    """Keys are strings and values JSON text in the database; anything else, pickles above all, is refused unread.

    SQLite has no checksums of its own, so a value stands behind that of its text, [name, record]: a bit that flips in it,
    or a page that takes another one's place, is noticed before it is used.

    Attributes:
        seal: makes and checks these sums.
    """

    seal: Seal = CHECKSUMS

    def put(self, key: Any) -> tuple[Any, bool]:
        """Key to database."""
        if type(key) is not str:
            raise TypeError(f"index names are strings, not {key!r}")
        return self.seal.index_name(key), True

    def get(self, key: Any, raw: Any) -> Any:
        """Key from database."""
        if not raw or type(key) is not str:
            raise IndexDamagedError("the index holds a name that is no string; it is not used")
        return plain_name(key, self.seal)

    def store(self, value: Any, read: bool, key: Any = None) -> tuple[int, int, None, str]:
        """Value to database."""
        if read:
            raise TypeError("the index stores no files")
        text = json.dumps([key, value], separators=(",", ":"))
        return 0, _RAW, None, self.seal.stamp(_KIND, "", text)  # the text begins with the record's name

    def fetch(self, mode: int, filename: str | None, value: Any, read: bool) -> Any:
        """Name and value from database."""
        return decode(mode, filename, value, self.seal)


def decode(mode: Any, filename: Any, value: Any, seal: Seal) -> list[Any]:
    """Name and record of a row, of which `seal` checks the sum."""
    if mode != _RAW or filename is not None or type(value) is not str:
        raise IndexDamagedError("the index holds a record that is not JSON (a pickle or a file); it is not read")
    text = seal.unstamp(_KIND, "", value)
    if text is None:
        raise IndexDamagedError("the index holds a record that fails its checksum")
    try:
        name, record = json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise IndexDamagedError("the index holds a record that is not a name and what stands under it") from error
    return [name, record]


def plain_name(hidden: str, seal: Seal) -> str:
    """A record's name, from that which stands in the database."""
    try:
        return seal.plain_index_name(hidden)
    except ValueError as error:
        raise IndexDamagedError("the index holds a name that this store never writes; it is not used") from error


def select_names(connection: sqlite3.Connection, prefix: str, after: str) -> list[str]:
    """The next names as they stand in the database that begin with `prefix`, in order, behind `after` ("" for the first ones); none at the end.

    It goes through the database's own index of names, from the first of them: what stands before costs nothing.
    """
    low, high = max(prefix, after), _behind(prefix)
    names = [
        name
        for (name,) in connection.execute(
            f"SELECT key FROM Cache WHERE key {'>' if after else '>='} ? AND key < ? AND raw = 1 ORDER BY key LIMIT ?",
            (low, high, _PAGE),
        )
    ]
    if any(type(name) is not str for name in names):
        raise IndexDamagedError("the index holds a name that is no string; it is not used")
    return names


def count_names(connection: sqlite3.Connection, prefix: str) -> int:
    """How many names begin with `prefix`."""
    ((count,),) = connection.execute(
        "SELECT COUNT(*) FROM Cache WHERE key >= ? AND key < ? AND raw = 1", (prefix, _behind(prefix))
    )
    return int(count)


class Database(diskcache.Cache):
    """A diskcache in `directory` whose connections are `Connections`, and whose records `seal` checks. Use it inside of `lent()`.

    Raises:
        IndexDamagedError: it has settings that diskcache never makes; diskcache would do what they say.
        sqlite3.Error: it can't be used.
    """

    def __init__(self, directory: Path, seal: Seal = CHECKSUMS) -> None:
        self._connections = Connections(directory / "cache.db", _connect)
        try:
            with self._connections.lent() as connection:
                _check_settings(connection)
                super().__init__(str(directory), timeout=BUSY_SECONDS, disk=JsonDisk, **_SETTINGS)
                # Not by diskcache's arguments for its disk, which it would write to the database.
                self.disk.seal = seal
                self._connections.note()
        except BaseException:
            self._connections.close()
            raise

    @property
    def _con(self) -> sqlite3.Connection:
        # The only place that diskcache takes a connection from. Its own are one a thread, closed when nobody remembers them.
        mine = self._connections.mine
        assert mine is not None, "the database is used outside of lent()"
        return mine

    @property
    def _sql_retry(self) -> Callable[..., sqlite3.Cursor]:
        # Without diskcache's own minute of retries: who waits for a lock, and for how long, is told by the index.
        return self._con.execute

    def lent(self) -> AbstractContextManager[sqlite3.Connection]:
        """A connection for this thread, which all calls inside use."""
        return self._connections.lent()

    def close_all(self) -> None:
        """Close all connections; those in use when their users are done."""
        self._connections.close()

    def let_go(self) -> None:
        """Close all connections, because the database has to be opened anew."""
        self._connections.let_go()

    def retire(self) -> None:
        """Close all connections, and make none any more: the database's files are about to be removed."""
        self._connections.retire()

    def is_let_go(self) -> bool:
        """Whether no connection held it open for a while, so that another database may stand in its place without being noticed."""
        return self._connections.is_let_go()

    def is_replaced(self) -> bool:
        """Whether another database stands in its place."""
        return self._connections.is_replaced()

    def has_lost_its_log(self) -> bool:
        """Whether what was written last is no longer seen by others."""
        return self._connections.has_lost_its_log()

    def names(self, prefix: str, check: Callable[[], None] = lambda: None) -> Iterator[str]:
        """Names that begin with `prefix`, in the database's order. Nothing is lent while the caller looks at one.

        Args:
            prefix: how they begin.
            check: is called on each connection that is read from, before that.
        """
        after = ""
        while True:
            with self.lent() as connection:
                check()
                page = select_names(connection, prefix, after)
            yield from (plain_name(hidden, self.disk.seal) for hidden in page)
            if len(page) < _PAGE:
                return
            after = page[-1]

    def count_of(self, prefix: str) -> int:
        """How many names begin with `prefix`."""
        with self.lent() as connection:
            return count_names(connection, prefix)


def _behind(prefix: str) -> str:
    """What comes behind every name that begins with `prefix`."""
    return prefix[:-1] + chr(ord(prefix[-1]) + 1) if prefix else "\U0010ffff"


def _connect(file: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(str(file), timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    try:
        for name in _PER_CONNECTION:
            connection.execute(f"PRAGMA {name.removeprefix('sqlite_')} = {_SETTINGS[name]}").fetchall()
        connection.execute("PRAGMA user_version").fetchall()  # a first read opens the log
    except BaseException:
        connection.close()
        raise
    return connection


def _check_settings(connection: sqlite3.Connection) -> None:
    try:
        rows = connection.execute("SELECT key FROM Settings LIMIT ?", (len(_OF_DISKCACHE) + 1,)).fetchall()
    except sqlite3.OperationalError as error:
        if "no such table" in str(error):
            return  # a new one
        raise
    for (name,) in rows:
        if name not in _OF_DISKCACHE:
            raise IndexDamagedError(f"the index holds a setting {name!r:.80}, which is none of its own; it is not used")
