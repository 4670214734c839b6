"""What an operator has done to a whole store: check it, make its index anew, remove chunks that are of no use any more."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from .placement import Placement
from .pruning import Keep, prune
from .repair import Repair
from .stats import PruneReport, VerifyReport

if TYPE_CHECKING:
    from .remote.shared import Shared

__all__ = ["Upkeep"]


class Upkeep:
    """Checks, repairs and prunes a store.

    Args:
        placement: the store's chunks.
        repair: compares its files with its index.
        shared: what it shares with other machines; None: nothing.
    """

    def __init__(self, placement: Placement, repair: Repair, shared: Shared | None) -> None:
        self._placement, self._repair, self._shared = placement, repair, shared

    def verify(self) -> VerifyReport:
        """See `ChunkStore.verify`."""
        with self._others_paused():
            report = self._repair.healed(lambda: self._repair.check(full=True))
        if self._shared is not None:
            self._repair.healed(self._shared.tier.catalogue.sweep)
        return report

    def rebuild_index(self) -> VerifyReport:
        """See `ChunkStore.rebuild_index`."""
        with self._others_paused():
            return self._repair.check(full=False, anew=True)

    def prune(self, keep: Keep, *, foreign_too: bool = False, dry_run: bool = False) -> PruneReport:
        """See `ChunkStore.prune`."""
        report = self._repair.healed(lambda: prune(self._placement, keep, foreign_too=foreign_too, dry_run=dry_run))
        if self._shared is not None:
            self._shared.changed()
        return report

    def _others_paused(self) -> contextlib.AbstractContextManager[None]:
        """While the context is open, the index may be replaced: no thread of this process follows the remote tier in it.

        Chunks that came from slower tiers are written to the home before.
        """
        self._placement.settle()
        return contextlib.nullcontext() if self._shared is None else self._shared.tier.catalogue.paused()
