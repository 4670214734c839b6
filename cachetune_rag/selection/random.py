"""A baseline to compare others with: tokens are drawn at random."""

from __future__ import annotations

import torch
from torch import Tensor

from cachetune_rag.selection import names
from cachetune_rag.selection.base import SelectionContext, Selector, all_places, total_budget


class RandomSelector(Selector):
    """floor(r * N) tokens over all chunks, drawn with a seed that depends on the prompt alone."""

    name = names.RANDOM

    def select(self, context: SelectionContext, ratio: float) -> Tensor:
        """See `Selector.select`."""
        places = all_places(context.chunks)
        generator = torch.Generator().manual_seed(context.seed)
        return places[torch.randperm(len(places), generator=generator)[: total_budget(context.chunks, ratio)]]
