"""Selection by expected error: recompute the tokens whose stored KV would disturb the query most.

Not in the paper. For a chunk that was captured behind several lead-ins, the deviations say how far each token's keys and values were
apart behind them. The query's tokens run through the model against the reused KV, and it is calculated how much each chunk token's
deviation changes what the layers give for the query. The change that the recomputed tokens then show is carried over to the other
tokens of their chunk. docs/selection.md has the derivation and the measurements.
"""

from __future__ import annotations

import math

from torch import Tensor

from cachetune_rag.selection import names
from cachetune_rag.selection.base import SelectionContext
from cachetune_rag.selection.probing import ProbingSelector

FIRST_LAYERS = 0.25
"""The share of the layers that look at all rows."""
SHORTLIST = 1 / 2
"""The share of the chunk tokens that the other layers look at (docs/selection.md, "The shortlist")."""
SLACK = 2
"""The shortlist has at least so many times the tokens that are chosen from it. With a ratio from 1 / SLACK on, every layer looks at all rows."""
LEAST = 256
"""The fewest tokens of a shortlist. In prompts with fewer chunk tokens every layer looks at all of them, which takes no time there."""


class ExpectedErrorSelector(ProbingSelector):
    """The top r over all chunks by expected error, with chunk shift: single tokens, in turn with whole sentences where words show that these have to do with the query.
    By received attention where no chunk has deviations.

    A fact is so recomputed whole or not at all, and so are facts that are nearly the one that is asked for, and the next fact of a chain (docs/selection.md, "Whole
    sentences").

    The first layers look at all rows, the others at a shortlist: the tokens that score highest in the first layers. The choice then needn't
    wait for the rows of the other tokens. What is found by the error left (a bound, a sign) needs the scores of all tokens, so there every
    layer looks at all rows, and no new passage is left out.

    Args:
        depth, queries: see `ProbingSelector`.
        shortlist: the share of the chunk tokens that the later layers look at.
        least: the fewest tokens of a shortlist.
    """

    name = names.EXPECTED_ERROR
    uses_deviations = True
    shift = 0.4
    by_sentences = True
    revision = 7  # 6: a short rest of a cut sentence that stood in the chunk before as well was no continuation; 5: earlier turns behind the chunks were looked from as the question; 4: lines of code that are cut were no continuations; 3: nor were rows of tables; 2: single tokens alone

    def __init__(self, depth: float = 1.0, queries: int = 64, shortlist: float = SHORTLIST, least: int = LEAST):
        super().__init__(depth, queries)
        self.shortlist, self.least = shortlist, least

    def shortlist_after(self, num_layers: int) -> int:
        """See `Selector.shortlist_after`."""
        first = max(1, round(FIRST_LAYERS * num_layers))
        return first if first < self.layers(num_layers) else 0

    def scores(self, context: SelectionContext, num_layers: int, chosen: int | None = None) -> Tensor:
        """See `ProbingSelector.scores`."""
        after = self.shortlist_after(context.num_layers)
        tokens = sum(chunk.tokens - chunk.skipped for chunk in context.chunks)
        count = tokens if chosen is None else max(math.ceil(self.shortlist * tokens), SLACK * chosen, self.least)
        shortlist = (after, count) if after and count < tokens else None
        return context.expected_error(num_layers, self.queries, shortlist, whole=chosen is None)


class EarlyExpectedErrorSelector(ExpectedErrorSelector):
    """The same from the first quarter of the layers. Recomputing begins while the rows of the other layers are still being copied.

    Where a GPU gets chunks from host memory, `expected_error` has to wait for all rows before anything is recomputed. This selector
    saves most of that time and loses a little fidelity (docs/selection.md, "How deep the probe looks").
    """

    name = names.EXPECTED_ERROR_EARLY
    by_sentences = False
    revision = 6  # 5: a short rest of a cut sentence that stood in the chunk before as well was no continuation; 4: earlier turns behind the chunks were looked from as the question; 3: lines of code that are cut were no continuations; 2: nor were rows of tables

    def __init__(self, depth: float = 0.25, queries: int = 64):
        super().__init__(depth, queries)


class TokenExpectedErrorSelector(ExpectedErrorSelector):
    """The same scores, and single tokens alone, as `expected_error` chose before its revision 3, but for rows of tables and lines of code: to compare with, and for text whose sentences say nothing."""

    name = names.EXPECTED_ERROR_TOKENS
    by_sentences = False
    revision = 5  # 4: a short rest of a cut sentence that stood in the chunk before as well was no continuation; 3: earlier turns behind the chunks were looked from as the question; 2: lines of code that are cut were no continuations; 1: nor were rows of tables
