"""A store's directory: what lies in it, its format version, and opening it."""

from __future__ import annotations

import contextlib
import json
import uuid
from pathlib import Path

from .diskindex import DiskIndex
from .documents import Documents
from .errors import IndexDamagedError, IndexReplacedError, StoreVersionError
from .files import TempFiles, locked, make_directory, write_small
from .index import COMPLETE
from .keys import FORMAT_VERSION
from .maintenance import check_files, compare_files
from .stats import VerifyReport
from .tiers import DiskTier

__all__ = ["StoreDirectory"]


class StoreDirectory:
    """The directory `path`, made if missing, for this user's eyes only.

    It holds store.json (the format version), chunks/, documents/, index/, damaged/, tmp/ and a lock that is held while
    the index is made or repaired.

    Raises:
        OSError: it can't be made or read.
        StoreVersionError: it holds a store of another format version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        make_directory(path)
        for name in ("chunks", "documents", "tmp"):
            make_directory(path / name)
        self.temp = TempFiles(path / "tmp")
        with self._lock():
            self._id = _identify(path / "store.json", self.temp)
            self.index = DiskIndex(path / "index")

    def bring_in_line(self, tier: DiskTier, documents: Documents) -> None:
        """Clean up after dead writers; if the index was lost, make it anew from the files.

        Where a writer died, files and index are compared: it may have changed one and not the other.
        """
        with self._lock():
            marks = self.temp.dead_marks()
            self._bring_in_line(tier, documents, crashed=bool(marks))
            for mark in marks:
                mark.unlink(missing_ok=True)

    def _bring_in_line(self, tier: DiskTier, documents: Documents, *, crashed: bool) -> None:
        # A damaged index, or one whose making was cut short, is no better than none.
        with contextlib.suppress(IndexDamagedError):
            if self.index.get(COMPLETE) == self._id:
                self.temp.clean()
                if crashed:
                    compare_files(tier, documents)
                return
        self._make_index(tier, documents)

    def check(self, tier: DiskTier, documents: Documents, *, full: bool, anew: bool) -> VerifyReport:
        """Check the files, whole or heads only, and repair the index; `anew`: forget the old one first."""
        with self._lock():
            if anew:
                return self._make_index(tier, documents)
            return check_files(tier, documents, self.temp, full=full)

    def heal(self, tier: DiskTier, documents: Documents, error: IndexDamagedError) -> None:
        """Make the index anew from the files, unless another process has just done so."""
        with self._lock():
            if not isinstance(error, IndexReplacedError) or self.index.get(COMPLETE) != self._id:
                self._make_index(tier, documents)

    def _make_index(self, tier: DiskTier, documents: Documents) -> VerifyReport:
        self.index.clear()
        report = check_files(tier, documents, self.temp, full=False)
        self.index.set(COMPLETE, self._id)
        return report

    def close(self) -> None:
        """Release the index; what was changed is in it."""
        self.index.close()
        self.temp.unmark()

    def _lock(self) -> contextlib.AbstractContextManager[None]:
        return locked(self.path / "lock")


def _identify(path: Path, temp: TempFiles) -> str:
    """The store's own id ("" if an early release made it); a new store's description is written."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        described = {"format": "cachetune-store", "version": FORMAT_VERSION, "id": uuid.uuid4().hex}
        write_small(temp, path, json.dumps(described).encode())
        return str(described["id"])
    try:
        described = json.loads(content)
        version = described["version"]
        identity = str(described.get("id", ""))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise StoreVersionError(
            f"{path} is damaged; if the directory is a store of version {FORMAT_VERSION}, delete that file and open "
            "the store again"
        ) from error
    if version != FORMAT_VERSION:
        raise StoreVersionError(
            f"{path.parent} holds a store of format version {version!r}; this release reads version {FORMAT_VERSION}. "
            "Use a release that reads it, or give the store another directory and precompute again"
        )
    return identity
