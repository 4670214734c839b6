"""What the authors' released code ranks by, which is not what their paper says."""

from __future__ import annotations

from torch import Tensor

from cachetune_rag.selection import names
from cachetune_rag.selection.base import SelectionContext, Selector, all_places, top_set, total_budget
from cachetune_rag.selection.frequency import low_pass_norm

ALPHA = 0.25
"""Share of the lowest frequencies that is kept."""


class Layer0ValueSelector(Selector):
    """The top r over all chunks by the low-passed values of layer 0 (the code released with CacheTune, arXiv 2605.24022).

    Unlike section 3 (`frequency`): only values, only of the first layer; the real FFT runs along the whole context, all
    chunks one after another, rather than along each chunk; the lowest quarter of the bins is kept, rather than half; one
    budget for the whole context. Text between the chunks is no part of it, nor are chunks that are not stored.
    """

    name = names.LAYER0_VALUE

    def __init__(self, alpha: float = ALPHA):
        """`alpha`: share of the bins that is kept, in [0, 1]."""
        self.alpha = alpha

    def select(self, context: SelectionContext, ratio: float) -> Tensor:
        """See `Selector.select`."""
        places = all_places(context.chunks)
        count = total_budget(context.chunks, ratio)
        if count in (0, len(places)):
            return places[:count]
        _, values = context.reused_states(0)
        scores = low_pass_norm(values[places.to(values.device)], self.alpha)
        return places[top_set(scores.cpu(), count)]
