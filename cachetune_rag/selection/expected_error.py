"""Selection by expected error: recompute the tokens whose stored KV would disturb the query most.

Not in the paper. For a chunk that was captured behind several lead-ins, the deviations say how far each token's keys and values were
apart behind them. The query's tokens run through the model against the reused KV, and it is calculated how much each chunk token's
deviation changes what the layers give for the query. The change that the recomputed tokens then show is carried over to the other
tokens of their chunk. docs/selection.md has the derivation and the measurements.
"""

from __future__ import annotations

from torch import Tensor

from cachetune_rag.selection import names
from cachetune_rag.selection.base import SelectionContext
from cachetune_rag.selection.probing import ProbingSelector


class ExpectedErrorSelector(ProbingSelector):
    """The top r over all chunks by expected error, with chunk shift. By received attention where no chunk has deviations."""

    name = names.EXPECTED_ERROR
    uses_deviations = True
    shift = 0.4

    def __init__(self, depth: float = 1.0, queries: int = 64):
        super().__init__(depth, queries)

    def scores(self, context: SelectionContext, num_layers: int) -> Tensor:
        """See `ProbingSelector.scores`."""
        return context.expected_error(num_layers, self.queries)


class EarlyExpectedErrorSelector(ExpectedErrorSelector):
    """The same from the first quarter of the layers. Recomputing begins while the rows of the other layers are still being copied.

    Where a GPU gets chunks from host memory, `expected_error` has to wait for all rows before anything is recomputed. This selector
    saves most of that time and loses a little fidelity (docs/selection.md, "How deep the probe looks").
    """

    name = names.EXPECTED_ERROR_EARLY

    def __init__(self, depth: float = 0.25, queries: int = 64):
        super().__init__(depth, queries)
