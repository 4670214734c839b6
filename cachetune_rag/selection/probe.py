"""Query-guided selection: recompute what the question attends to.

Not in the paper. The query's tokens run through the first layers against the reused KV as those layers arrive, and the
tokens of all chunks compete for one budget by the attention they receive (docs/selection.md has the measurements).
"""

from __future__ import annotations

from torch import Tensor

from cachetune_rag.selection.base import SelectionContext, Selector, all_places, top_places, total_budget


class ProbeSelector(Selector):
    """The top r over all chunks by the attention of the prompt's last tokens in the first layers."""

    name = "probe"

    def __init__(self, depth: float = 0.25, queries: int = 16):
        """`depth`: share of the layers that the probe runs through; `queries`: how many last tokens are watched."""
        self.depth, self.queries = depth, queries

    def layers(self, num_layers: int) -> int:
        """See `Selector.layers`."""
        return max(1, round(self.depth * num_layers))

    def select(self, context: SelectionContext, ratio: float) -> Tensor:
        """See `Selector.select`."""
        places = all_places(context.chunks)
        count = total_budget(context.chunks, ratio)
        if count in (0, len(places)):
            return places[:count]
        received = context.received_attention(self.layers(context.num_layers), self.queries)
        # On the host: a copy to a GPU would wait for all the KV that is on its way there.
        return top_places(received.cpu(), places, count)
