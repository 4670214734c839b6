"""Selection by what reuse is expected to cost: recompute what would disturb the query most.

Not in the paper. A chunk that was captured behind several lead-ins knows how far each token's key and value moved from one
to another. The query's tokens run through the model against the reused KV, and every chunk token's deviation is followed
through their attention to the layers' outputs. What the recomputed tokens then show to have changed is carried over to the
others of their chunk. docs/selection.md has the derivation and the measurements.
"""

from __future__ import annotations

from torch import Tensor

from cachetune_rag.selection import names
from cachetune_rag.selection.base import SelectionContext
from cachetune_rag.selection.probing import ProbingSelector


class ExpectedErrorSelector(ProbingSelector):
    """The top r over all chunks by expected error, with chunk shift. Plain received attention where nothing is known of the
    chunks' deviations.
    """

    name = names.EXPECTED_ERROR
    uses_deviations = True
    shift = 0.4

    def __init__(self, depth: float = 1.0, queries: int = 64):
        super().__init__(depth, queries)

    def look(self, context: SelectionContext, num_layers: int) -> Tensor:
        """See `ProbingSelector.look`."""
        return context.expected_error(num_layers, self.queries)


class EarlyExpectedErrorSelector(ExpectedErrorSelector):
    """The same from the first quarter of the layers: recomputing begins while the rows of the others are still on their way.

    Where chunks come from a GPU's host memory, the whole of `expected_error` can't end before all rows are there. This gives up a
    few points of fidelity for most of that time (docs/selection.md, "How deep the probe looks").
    """

    name = names.EXPECTED_ERROR_EARLY

    def __init__(self, depth: float = 0.25, queries: int = 64):
        super().__init__(depth, queries)
