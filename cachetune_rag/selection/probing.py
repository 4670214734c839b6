"""What selectors have in common that run the query against the reused KV before they choose."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from cachetune_rag.selection.base import SelectionContext, Selector, all_places, top_places, total_budget


class ProbingSelector(Selector):
    """The top r over all chunks by scores that a probe of the first layers gives.

    Args:
        depth: share of the layers that the probe runs through.
        queries: how many of the prompt's last tokens are watched.
    """

    def __init__(self, depth: float, queries: int):
        self.depth, self.queries = depth, queries

    def layers(self, num_layers: int) -> int:
        """See `Selector.layers`."""
        return max(1, round(self.depth * num_layers))

    @abstractmethod
    def scores(self, context: SelectionContext, num_layers: int) -> Tensor:
        """A score of every prompt token from the first `num_layers` layers: float32 [length], on the model's device."""

    def select(self, context: SelectionContext, ratio: float) -> Tensor:
        """See `Selector.select`."""
        places = all_places(context.chunks)
        count = total_budget(context.chunks, ratio)
        if count in (0, len(places)):
            return places[:count]
        scores = self.scores(context, self.layers(context.num_layers))
        # The choice is made on the host: sending `places` to a GPU would wait for all KV that is still being copied there.
        return top_places(scores.cpu(), places, count)
