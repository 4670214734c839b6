"""Repairs the index when it turns out to be damaged, and follows one that another process has replaced."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from .directory import StoreDirectory
from .documents import Documents
from .errors import IndexDamagedError, IndexReplacedError
from .files import explain
from .placement import Placement
from .stats import VerifyReport
from .tiers import DiskTier, HostTier

__all__ = ["Repair"]

_Result = TypeVar("_Result")
_FOLLOWS = 16
"""How often an action is tried again because another process replaced the index."""


class Repair:
    """Compares a store's files with its index, and makes the index anew if necessary.

    Args:
        directory: the store's directory; None if the store is only in memory, where nothing can differ.
        placement, documents: the chunks and documents that are in the index.
    """

    def __init__(self, directory: StoreDirectory | None, placement: Placement, documents: Documents) -> None:
        self._directory, self._placement, self._documents = directory, placement, documents

    def healed(self, action: Callable[[], _Result]) -> _Result:
        """The action's result. If the index turns out to be damaged, it is rebuilt, and the action is done again.

        Raises:
            StoreFullError, StorePathError: instead of the OSError that the action raised.
        """
        try:
            for _ in range(_FOLLOWS):
                try:
                    return action()
                except IndexReplacedError as error:
                    self.heal(error)  # another process may replace it again meanwhile
                except IndexDamagedError as error:
                    self.heal(error)
                    break
            return action()
        except OSError as error:
            raise explain(error, "memory" if self._directory is None else self._directory.path) from error

    def heal(self, error: IndexDamagedError) -> None:
        """Make the index anew, unless another process has just done so."""
        disk = self._placement.find(DiskTier)
        assert self._directory is not None
        assert disk is not None
        try:
            self._directory.heal(disk, self._documents, error)
        except OSError as failed:
            raise explain(failed, self._directory.path) from failed

    def check(self, *, full: bool, anew: bool = False) -> VerifyReport:
        """Check the files (all of each, or only its head) and repair the index; with `anew`, make a new index instead."""
        disk = self._placement.find(DiskTier)
        if self._directory is None or disk is None:
            # Without files there is nothing to check.
            host = self._placement.find(HostTier)
            stats = None if host is None else host.stats()
            chunks, size = (0, 0) if stats is None else (stats.chunks, stats.bytes)
            return VerifyReport(chunks, size, (), 0, 0, 0, self._documents.count())
        try:
            return self._directory.check(disk, self._documents, full=full, anew=anew)
        except OSError as error:
            raise explain(error, self._directory.path) from error
