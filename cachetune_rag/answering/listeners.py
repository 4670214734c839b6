"""What happens behind a request: chunks that it missed are stored."""

from __future__ import annotations

from dataclasses import replace

from cachetune_rag.answering.request import Finished, Request, RequestListener
from cachetune_rag.chunks.backfill import Backfill
from cachetune_rag.report import Report
from cachetune_rag.reuse.state import PrefillState


class BackfillListener(RequestListener):
    """Has the chunks that a request missed stored once the model has time for it."""

    def __init__(self, backfill: Backfill):
        self._backfill = backfill

    def finished(self, end: Finished) -> Report:
        """Adds how many chunks will be stored, and how many will not."""
        missed = end.state.missed
        storing = self._backfill.offer(end.request.prompt, missed)
        return replace(end.report, storing=storing, unstored=len(missed) - storing)

    def abandoned(self, request: Request, state: PrefillState) -> None:
        """The prompt was read to its end, so its missed chunks are worth storing all the same."""
        self._backfill.offer_from_anywhere(request.prompt, state.missed)
