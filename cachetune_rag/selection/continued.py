"""Scores of sentences that two chunks share.

The second chunk was stored without the sentence's beginning, so the keys of its first tokens say less than they would in the prompt: "is 48213." doesn't say
whose number that is. A query that looks for it finds the beginning, in the chunk before, and passes the rest by. So a score that comes from what the query attends to is
too low for the rest, and is raised to the beginning's largest.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cachetune_rag.selection.base import ReusedChunk


def with_continuations(
    scores: Tensor, continuations: Sequence[tuple[range, range]], chunks: Sequence[ReusedChunk]
) -> Tensor:
    """The scores, where each token of a sentence's rest has at least the largest score of its beginning.

    Args:
        scores: float32 [length], on the host; they stay as they are.
        continuations: see `SelectionContext`.
        chunks: the reused chunks. A beginning of which nothing is reused has no scores; the rest of such a sentence has the largest of all reused tokens.
    """
    if not continuations:
        return scores
    reused = np.zeros(len(scores), np.bool_)
    for chunk in chunks:
        reused[chunk.start : chunk.start + chunk.tokens] = True
    numbers = scores.numpy()
    raised, most = numbers.copy(), numbers[reused].max(initial=0)
    for begun, rest in continuations:
        known = numbers[begun.start : begun.stop][reused[begun.start : begun.stop]]
        least = known.max() if len(known) else most
        part = slice(rest.start, rest.stop)
        raised[part] = np.where(reused[part], np.maximum(raised[part], least), raised[part])
    return torch.from_numpy(raised)
