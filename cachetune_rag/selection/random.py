"""A baseline: any tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from cachetune_rag.selection import names
from cachetune_rag.selection.base import SelectionContext, Selector, all_places, total_budget


class RandomSelector(Selector):
    """floor(r * N) tokens over all chunks, drawn by a seed that the prompt alone decides."""

    name = names.RANDOM

    def select(self, context: SelectionContext, ratio: float) -> Tensor:
        """See `Selector.select`."""
        places = all_places(context.chunks)
        generator = torch.Generator().manual_seed(context.seed)
        return places[torch.randperm(len(places), generator=generator)[: total_budget(context.chunks, ratio)]]
