"""Query-guided selection: recompute what the question attends to.

Not in the paper. The query's tokens run through the first layers against the reused KV as those layers arrive, and the
tokens of all chunks compete for one budget by the attention they receive (docs/selection.md has the measurements).
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

    def look(self, context: SelectionContext, num_layers: int) -> Tensor:
        """See `ProbingSelector.look`."""
        return context.received_attention(num_layers, self.queries)
