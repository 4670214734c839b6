"""The ranking in the code that the paper's authors released, which differs from the paper."""

from __future__ import annotations

from torch import Tensor

from cachetune_rag.selection import names
from cachetune_rag.selection.base import SelectionContext, Selector, all_places, top_set, total_budget
from cachetune_rag.selection.frequency import low_pass_norm

ALPHA = 0.25
"""Share of the frequencies that is kept, the lowest ones."""


class Layer0ValueSelector(Selector):
    """The top r over all chunks by the low-pass filtered values of layer 0 (the code released with CacheTune, arXiv 2605.24022).

    It differs from section 3 (`frequency`) in these points. Only values are used, and only those of the first layer. The real FFT runs
    along all chunks, one after another, instead of along each chunk. A quarter of the frequencies is kept instead of half. Tokens are
    chosen over all chunks together. Text between the chunks and chunks that are not stored are left out.
    """

    name = names.LAYER0_VALUE

    def __init__(self, alpha: float = ALPHA):
        """`alpha`: share of the bins that is kept, in [0, 1]."""
        self.alpha = alpha

    def looks_at(self, num_layers: int) -> int:
        """See `Selector.looks_at`."""
        return 1

    def select(self, context: SelectionContext, ratio: float) -> Tensor:
        """See `Selector.select`."""
        places = all_places(context.chunks)
        count = total_budget(context.chunks, ratio)
        if count in (0, len(places)):
            return places[:count]
        _, values = context.reused_states(0)
        scores = low_pass_norm(values[places.to(values.device)], self.alpha)
        return places[top_set(scores.cpu(), count)]
