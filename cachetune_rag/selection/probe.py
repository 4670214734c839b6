"""Selection by the query's attention: recompute what the query attends to.

Not in the paper. The query's tokens run through the first layers, against the reused KV of those layers, as soon as it is there. The
tokens that receive most attention are chosen, over all chunks together (docs/selection.md has the measurements).
"""

from __future__ import annotations

from torch import Tensor

from cachetune_rag.selection import names
from cachetune_rag.selection.base import SelectionContext
from cachetune_rag.selection.probing import ProbingSelector


class ProbeSelector(ProbingSelector):
    """The top r over all chunks by the attention of the prompt's last tokens in the first layers."""

    name = names.PROBE

    def __init__(self, depth: float = 0.25, queries: int = 16):
        super().__init__(depth, queries)

    def scores(self, context: SelectionContext, num_layers: int, chosen: int | None = None) -> Tensor:
        """See `ProbingSelector.scores`."""
        return context.received_attention(num_layers, self.queries, whole=chosen is None)
