"""EPIC's selection: the first tokens of each chunk, which were computed without the text that stands before them in the prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from cachetune_rag.selection import names
from cachetune_rag.selection.base import SelectionContext, Selector


class ChunkHeadSelector(Selector):
    """The first floor(r * N) tokens of each chunk (EPIC, arXiv 2410.15332)."""

    name = names.CHUNK_HEAD

    def select(self, context: SelectionContext, ratio: float) -> Tensor:
        """See `Selector.select`."""
        picked = [c.places()[: c.budget(ratio)] for c in context.chunks]
        return torch.cat(picked) if picked else torch.empty(0, dtype=torch.int64)
