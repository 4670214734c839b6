"""A store's directory: what lies in it, its format version, and opening it."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from .description import MOST_BYTES, Description, check_encrypted, no_key
from .diskindex import DiskIndex
from .documents import Documents
from .errors import IndexDamagedError, IndexReplacedError, StoreKeyError, StoreVersionError
from .files import TempFiles, make_directory, unreadable, write_small
from .index import COMPLETE, Index
from .keys import FORMAT_VERSION
from .locks import locked, open_lock
from .maintenance import apply, check_files, compare_files
from .paths import DESCRIPTION
from .plainfiles import UnfitFileError, files_below, read_plain
from .printing import shown
from .readonlyindex import ReadOnlyIndex
from .stats import VerifyReport
from .storekey import StoreKey
from .tiers import DiskTier

if TYPE_CHECKING:
    from .encryption import Keyring

__all__ = ["StoreDirectory"]

_READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}
_FOLDERS = ("chunks", "documents", "tmp")
_WRITTEN = ("chunks", "documents", "notes", "secrets")
_LOCKS = ("index.lock", "claims.lock", "tmp/gate.lock")
_log = logging.getLogger(__name__)


class StoreDirectory:
    """The directory `path`, made if missing, for this user's eyes only.

    It holds store.json (the format version), chunks/, documents/, index/, damaged/, tmp/ and a lock that is held while
    the index is made or repaired. To open a store that is in order takes no lock.

    A store of which any part can't be written is read only, as a whole: to write one part and not the other would leave files and
    index apart. The log says which part it is.

    Args:
        path: the directory.
        key: the store's key; None if it has none.
        keyring: makes what has the secrets of tenants, if the store is encrypted.
        encrypt: whether a new store is encrypted, and another one is refused. One that is there says itself whether it is.

    Attributes:
        encrypted: whether the store is encrypted.
        read_only: why nothing is written, with the part's path as its `filename`; None if all parts can be written.
        seal: makes and checks the sums of what is stored.

    Raises:
        StoreKeyError: the store has another key, or none, or isn't encrypted and should be.
        OSError: it can't be made.
        StorePathError: something else stands in a file's place, or a part can't be read.
        StoreVersionError: it holds a store of another format version.
    """

    def __init__(
        self, path: Path, key: StoreKey | None, keyring: Callable[[], Keyring], *, encrypt: bool = False
    ) -> None:
        self.path = path
        self._key, self._keyring, self._encrypt = key, keyring, encrypt
        self._making = threading.RLock()
        make_directory(path)
        self.read_only = _refusal(path)
        self.temp = TempFiles(path / "tmp")
        _check_readable(path)
        if self.read_only is not None:
            # A store that lies where nothing may be written is opened so on purpose; of one with an odd part somebody should know.
            _log.log(
                logging.WARNING if os.access(path, os.W_OK) else logging.INFO,
                "the store %s is only read: %s can't be written (%s). Nothing is stored, removed or repaired; to store, let this user "
                "write that part and open the store again",
                path,
                self.read_only.filename or path,
                self.read_only.strerror,
            )
            self._open(_read_description(path / DESCRIPTION) or Description(FORMAT_VERSION, "", None))
            self.index: Index = ReadOnlyIndex(path / "index", self.seal)
            return
        self._open(_read_description(path / DESCRIPTION) or self._describe())
        self.index = DiskIndex(path / "index", self.seal)

    def _open(self, described: Description) -> None:
        self._id, self.encrypted = described.identity, described.encrypted
        self.seal = described.seal(self._key, str(self.path), self._keyring)
        if self._encrypt:
            check_encrypted(described, str(self.path))

    def bring_in_line(self, tier: DiskTier, documents: Documents) -> None:
        """Clean up after dead writers; if the index was lost, make it anew from the files.

        Where a writer died, files and index are compared: it may have changed one and not the other.
        """
        if self.read_only is not None:
            if not self._is_complete():
                self._make_index(tier, documents)
            return
        if not self.temp.dead_marks() and self._is_complete():
            self.temp.clean()
            return
        with self._lock():
            marks = self.temp.dead_marks()
            # A damaged index, or one whose making was cut short, is no better than none.
            if not self._is_complete():
                self._make_index(tier, documents)
            else:
                self.temp.clean()
                if marks:
                    self._compare(tier, documents)
            # If something couldn't be read, this process has a mark of its own now, which stays.
            for mark in marks:
                mark.unlink(missing_ok=True)

    def check(self, tier: DiskTier, documents: Documents, *, full: bool, anew: bool) -> VerifyReport:
        """Check the files, whole or heads only, and repair the index; `anew`: forget the old one first."""
        if anew:
            with self._lock():
                return self._make_index(tier, documents)
        # To read all files may take hours, and nobody need wait for it: each is looked at for itself.
        found = check_files(tier, full=full)
        with self._lock():
            return apply(found, tier, documents, self.temp)

    def heal(self, tier: DiskTier, documents: Documents, error: IndexDamagedError) -> None:
        """Make the index anew from the files, unless another process has just done so."""
        # In a store that is only read, an index is made in memory, by one thread.
        with self._lock() if self.read_only is None else self._making:
            if not isinstance(error, IndexReplacedError) or not self._is_complete():
                self._make_index(tier, documents)

    def _is_complete(self) -> bool:
        with contextlib.suppress(IndexDamagedError):
            return bool(self.index.get(COMPLETE) == self._id)
        return False

    def _compare(self, tier: DiskTier, documents: Documents) -> None:
        try:
            compare_files(tier, documents, self.temp)
        except IndexDamagedError:
            self._make_index(tier, documents)

    def _make_index(self, tier: DiskTier, documents: Documents) -> VerifyReport:
        with self.index.made_anew(self._id):
            if self.read_only is not None:
                # In memory, from what can be read. Damage is noticed when it is used.
                compare_files(tier, documents, None)
                return VerifyReport(0, 0, (), 0, 0, 0, documents.count())
            return apply(check_files(tier, full=False), tier, documents, self.temp)

    def close(self) -> None:
        """Release the index; what was changed is in it."""
        self.index.close()
        self.temp.unmark()

    def change_key(self, new: StoreKey) -> None:
        """Protect the root key with another key from now on.

        Raises:
            StoreKeyError: the store has no key.
        """
        path = self.path / DESCRIPTION
        with self._lock():
            described = _read_description(path)
            if described is None or self._key is None:
                raise no_key(str(self.path))
            write_small(self.temp, path, described.with_key(self._key, new, str(self.path)).content)
        self._key = new

    def _describe(self) -> Description:
        """Write the description of a store that has none, and return it; what stands in its place is set aside."""
        path = self.path / DESCRIPTION
        with self._lock():
            described = _read_description(path)  # another process may have been first
            if described is not None:
                return described
            if self._key is not None and any(next(files_below(self.path / part, ""), None) for part in _WRITTEN):
                raise StoreKeyError(
                    f"{path} is gone, and what a store wrote is there: without it, the key can't tell whether it is the store's own. Put the file "
                    f"back, or delete {self.path} and precompute again"
                )
            if os.path.lexists(path):
                aside = self.path / "damaged"
                make_directory(aside)
                _log.warning("%s is no plain file of a store's: it is set aside, and the index made anew", path)
                path.replace(aside / f"{time.time_ns():020d}-{path.name}")
            described = Description.new(self._key, encrypted=self._encrypt)
            write_small(self.temp, path, described.content)
            return described

    def _lock(self) -> contextlib.AbstractContextManager[None]:
        return locked(self.path / "lock")


def _refusal(path: Path) -> OSError | None:
    """Why a part of a store that is there can't be written; None if all can, or if there is no store.

    Chunks' own folders are not looked at: there may be hundreds, and the error of a write names its folder.
    """
    try:
        open_lock(path / "lock").close()
        for name in _FOLDERS:
            make_directory(path / name)
            _check_access(path / name, os.W_OK | os.X_OK)
        for lock in _LOCKS:
            open_lock(path / lock).close()
        for name in ("notes", "secrets"):  # made with the first note, as their locks are
            _check_access(path / name, os.W_OK | os.X_OK)
            _check_access(path / name / "lock", os.W_OK)
        # What stands in the index's place otherwise is replaced when the index is made.
        if (path / "index").is_dir():
            _check_access(path / "index", os.W_OK | os.X_OK)
            for file in (path / "index").glob("cache.db*"):
                _check_access(file, os.W_OK)
    except OSError as error:
        if error.errno not in _READ_ONLY or not (path / DESCRIPTION).exists():
            raise
        return error
    return None


def _check_readable(path: Path) -> None:
    """See that what requests read can be read, if it is there: otherwise the store would seem to be empty.

    Raises:
        StorePathError: a part can't be.
    """
    for name, mode in ((DESCRIPTION, os.R_OK), ("chunks", os.R_OK | os.X_OK), ("documents", os.R_OK | os.X_OK)):
        part = path / name
        try:
            _check_access(part, mode)
        except OSError as error:
            if error.errno in _READ_ONLY:
                raise unreadable(error, part) from error


def _check_access(path: Path, mode: int) -> None:
    """See that this process may use what stands at `path`; nothing is changed.

    Raises:
        OSError: it may not; `filename` is the path.
    """
    if os.access(path, mode) or not os.path.lexists(path):
        return
    writes = bool(mode & os.W_OK)
    read_only = writes and bool(os.statvfs(path).f_flag & os.ST_RDONLY)
    number = errno.EROFS if read_only else errno.EACCES
    raise OSError(number, os.strerror(number), os.fspath(path))


def _read_description(path: Path) -> Description | None:
    """The store's description; None if there is none, or something that is none."""
    try:
        content = read_plain(path, MOST_BYTES)
    except (FileNotFoundError, UnfitFileError):
        return None
    try:
        described = Description.read(content)
    except ValueError as error:
        raise StoreVersionError(
            f"{path} is damaged; if the directory is a store of version {FORMAT_VERSION}, delete that file and open "
            "the store again"
        ) from error
    if not described.is_known:
        raise StoreVersionError(
            f"{path.parent} holds a store of format version {shown(described.version)}; this release reads version {FORMAT_VERSION}. "
            "Use a release that reads it, or give the store another directory and precompute again"
        )
    return described
