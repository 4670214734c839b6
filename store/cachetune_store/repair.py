"""Going on with an index that turns out to be damaged, or that another process has replaced."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from .directory import StoreDirectory
from .documents import Documents
from .errors import IndexDamagedError, IndexReplacedError
from .files import explain
from .placement import Placement
from .stats import VerifyReport

__all__ = ["Repair"]

_Result = TypeVar("_Result")
_FOLLOWS = 16
"""Times in a row that an index which others replace is followed."""


class Repair:
    """Checks a store's files against its index, and makes the index anew where it has to be.

    Args:
        directory: the store's; None if it is in memory only, so that there is nothing to differ from.
        placement, documents: what the index tells of.
    """

    def __init__(self, directory: StoreDirectory | None, placement: Placement, documents: Documents) -> None:
        self._directory, self._placement, self._documents = directory, placement, documents

    def healed(self, action: Callable[[], _Result]) -> _Result:
        """The action's result; if the index turns out to be damaged, it is rebuilt and the action done again.

        Raises:
            StoreFullError, StorePathError: in place of the system's errors.
        """
        try:
            for _ in range(_FOLLOWS):
                try:
                    return action()
                except IndexReplacedError as error:
                    self.heal(error)  # others may replace it once more while this one follows
                except IndexDamagedError as error:
                    self.heal(error)
                    break
            return action()
        except OSError as error:
            raise explain(error, "memory" if self._directory is None else self._directory.path) from error

    def heal(self, error: IndexDamagedError) -> None:
        """Make the index anew, unless another process has just done so."""
        assert self._directory is not None
        assert self._placement.disk is not None
        try:
            self._directory.heal(self._placement.disk, self._documents, error)
        except OSError as failed:
            raise explain(failed, self._directory.path) from failed

    def check(self, *, full: bool, anew: bool = False) -> VerifyReport:
        """Check the files, whole or heads only, and repair the index; `anew`: forget the old one first."""
        placement = self._placement
        if self._directory is None or placement.disk is None:
            # Nothing on disk to differ from: rows in memory are as they were put.
            stats = placement.host.stats()
            return VerifyReport(stats.chunks, stats.bytes, (), 0, 0, 0, self._documents.count())
        try:
            return self._directory.check(placement.disk, self._documents, full=full, anew=anew)
        except OSError as error:
            raise explain(error, self._directory.path) from error
