"""The two ends: recompute nothing, recompute everything. Both ignore the ratio."""

from __future__ import annotations

import torch
from torch import Tensor

from cachetune_rag.selection import names
from cachetune_rag.selection.base import SelectionContext, Selector, all_places


class NoneSelector(Selector):
    """No token is recomputed."""

    name = names.NONE
    uses_ratio = False

    def select(self, context: SelectionContext, ratio: float) -> Tensor:
        """See `Selector.select`."""
        return torch.empty(0, dtype=torch.int64)


class AllSelector(Selector):
    """Every token is recomputed, so the result is that of full prefill."""

    name = names.ALL
    uses_ratio = False

    def share(self, ratio: float) -> float:
        """See `Selector.share`."""
        return 1.0

    def select(self, context: SelectionContext, ratio: float) -> Tensor:
        """See `Selector.select`."""
        return all_places(context.chunks)
