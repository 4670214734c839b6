"""What selectors have in common that run the query against the reused KV before they choose."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar

import numpy as np
from torch import Tensor

from cachetune_rag.selection.base import SelectionContext, Selector, all_places, total_budget
from cachetune_rag.selection.bound import RatioFinder
from cachetune_rag.selection.choice import Choice, unsureness
from cachetune_rag.selection.continued import with_continuations
from cachetune_rag.selection.whole_sentences import Chooser, SentenceChoice, SingleTokens


class ProbingSelector(Selector):
    """The top r over all chunks by scores that a probe of the first layers gives.

    Args:
        depth: share of the layers that the probe runs through.
        queries: how many of the prompt's last tokens are watched.
    """

    predicts = True
    revision = 5  # 4: a short rest of a cut sentence that stood in the chunk before as well was no continuation; 3: lines of code that are cut were no continuations; 2: nor were rows of tables; 1: the rest of a cut sentence had no more than its own score
    by_sentences: ClassVar[bool] = False
    """Whether whole sentences are chosen beside single tokens (`selection/whole_sentences.py`)."""

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

    def chooser(self, context: SelectionContext, places: Tensor) -> Callable[[Tensor], Chooser]:
        """What chooses among places by scores, float32 [length], on the host. What can be known without the scores is known once this returns."""
        return SentenceChoice(context, places).by if self.by_sentences else lambda scores: SingleTokens(scores, places)

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
        on_device = self.scores(context, layers, count if finder is None else None)
        choose_by = self.chooser(context, places)
        scores = with_continuations(on_device.cpu(), context.continuations, context.chunks)
        chooser = choose_by(scores)
        numbers = scores.numpy()
        total = numbers[places.numpy()].sum(dtype=np.float64)

        def left_by(chosen: Tensor) -> float:
            return max(0.0, float(total - numbers[chosen.numpy()].sum(dtype=np.float64)))

        signs: dict[float, float] = {}
        prediction = None
        if finder is not None:
            unsure = unsureness(context.next_token(layers))
            for each in finder.ratios or (ratio,):
                signs[each] = left_by(chooser.take(total_budget(context.chunks, each))) * unsure
            found, prediction = finder.find(list(signs.values()))
            ratio = ratio if found is None else found
            count = total_budget(context.chunks, ratio)
        chosen = chooser.take(count)
        return Choice(chosen, ratio, left_by(chosen), signs.get(ratio), prediction)
