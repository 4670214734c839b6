"""What selectors have in common that run the query against the reused KV before they choose."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
from torch import Tensor

from cachetune_rag.selection.base import SelectionContext, Selector, all_places, top_places, total_budget
from cachetune_rag.selection.bound import Bound
from cachetune_rag.selection.choice import Choice, ErrorLeft


class ProbingSelector(Selector):
    """The top r over all chunks by scores that a probe of the first layers gives.

    Args:
        depth: share of the layers that the probe runs through.
        queries: how many of the prompt's last tokens are watched.
    """

    predicts = True

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
        return self.choose(context, ratio).places

    def choose(self, context: SelectionContext, ratio: float, bound: Bound | None = None) -> Choice:
        """See `Selector.choose`."""
        places = all_places(context.chunks)
        count = total_budget(context.chunks, ratio)
        if bound is None and count in (0, len(places)):
            return Choice(places[:count], ratio)
        # The choice is made on the host: sending `places` to a GPU would wait for all KV that is still being copied there.
        scores = self.scores(context, self.layers(context.num_layers)).cpu()
        prediction = None
        if bound is not None:
            left = ErrorLeft(scores.numpy()[places.numpy()])
            prediction = bound.predict(left.behind([total_budget(context.chunks, r) for r in bound.predictor.ratios]))
            ratio = prediction.ratio
            count = total_budget(context.chunks, ratio)
        chosen = top_places(scores, places, count) if 0 < count < len(places) else places[:count]
        # Summed in float64: the sums of other ratios are taken of the same numbers in another order.
        numbers = scores.numpy()
        left_over = numbers[places.numpy()].sum(dtype=np.float64) - numbers[chosen.numpy()].sum(dtype=np.float64)
        return Choice(chosen, ratio, max(0.0, float(left_over)), prediction)
