"""What selectors have in common that run the query against the reused KV before they choose."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
from torch import Tensor

from cachetune_rag.selection.base import SelectionContext, Selector, all_places, top_places, total_budget
from cachetune_rag.selection.bound import RatioFinder
from cachetune_rag.selection.choice import Choice, ErrorLeft, unsureness
from cachetune_rag.selection.continued import with_continuations


class ProbingSelector(Selector):
    """The top r over all chunks by scores that a probe of the first layers gives.

    Args:
        depth: share of the layers that the probe runs through.
        queries: how many of the prompt's last tokens are watched.
    """

    predicts = True
    revision = 2  # 1: the rest of a cut sentence had no more than its own score

    def __init__(self, depth: float, queries: int):
        self.depth, self.queries = depth, queries

    def layers(self, num_layers: int) -> int:
        """See `Selector.layers`."""
        return max(1, round(self.depth * num_layers))

    @abstractmethod
    def scores(self, context: SelectionContext, num_layers: int, chosen: int | None = None) -> Tensor:
        """A score of every prompt token from the first `num_layers` layers: float32 [length], on the model's device.

        Args:
            context, num_layers: the request, and how many layers are run.
            chosen: how many of the tokens will be chosen, if only their order at the top counts; None: the score of every token counts.
        """

    def select(self, context: SelectionContext, ratio: float) -> Tensor:
        """See `Selector.select`."""
        return self.choose(context, ratio).places

    def choose(self, context: SelectionContext, ratio: float, finder: RatioFinder | None = None) -> Choice:
        """See `Selector.choose`."""
        places = all_places(context.chunks)
        count = total_budget(context.chunks, ratio)
        if finder is None and count in (0, len(places)):
            return Choice(places[:count], ratio)
        layers = self.layers(context.num_layers)
        # The choice is made on the host: sending `places` to a GPU would wait for all KV that is still being copied there.
        scores = self.scores(context, layers, count if finder is None else None).cpu()
        scores = with_continuations(scores, context.continuations, context.chunks)
        signs: dict[float, float] = {}
        prediction = None
        if finder is not None:
            left = ErrorLeft(scores.numpy()[places.numpy()])
            unsure = unsureness(context.next_token(layers))
            ladder = finder.ratios or (ratio,)
            errors = left.behind([total_budget(context.chunks, each) for each in ladder])
            signs = {each: error * unsure for each, error in zip(ladder, errors, strict=True)}
            found, prediction = finder.find(list(signs.values()))
            ratio = ratio if found is None else found
            count = total_budget(context.chunks, ratio)
        chosen = top_places(scores, places, count) if 0 < count < len(places) else places[:count]
        numbers = scores.numpy()
        # Summed in float64, as those of `ErrorLeft`.
        error_left = numbers[places.numpy()].sum(dtype=np.float64) - numbers[chosen.numpy()].sum(dtype=np.float64)
        return Choice(chosen, ratio, max(0.0, float(error_left)), signs.get(ratio), prediction)
