"""Numbers that are known of each token of a vocabulary by what it spells."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from cachetune_rag.text.prompts.continuations import Pieces

MOST = 127
"""The largest number in a table; larger ones count as so much."""


class TokenTable:
    """A few numbers for each token, which are worked out when it is first seen. Safe to use from many threads.

    Args:
        pieces: spells tokens.
        numbers_of: gives a token's numbers, none below 0, by what it spells.
        width: how many these are.
    """

    def __init__(self, pieces: Pieces, numbers_of: Callable[[str], Sequence[int]], width: int):
        self._pieces, self._numbers_of = pieces, numbers_of
        self._known = np.empty((0, width), np.int8)

    def __call__(self, ids: NDArray[np.int64]) -> NDArray[np.int8]:
        """The numbers of tokens: [width, tokens]."""
        known = before = self._known  # read once: another thread may put a larger one there
        if len(ids) and int(ids.max()) >= len(known):
            known = np.full((int(ids.max()) + 1, before.shape[1]), -1, np.int8)
            known[: len(before)] = before
        new = np.unique(ids[known[ids, 0] < 0]) if len(ids) else ids
        if len(new):
            known = known.copy()  # another thread may be reading the one that was there
            known[new] = [
                [min(MOST, number) for number in self._numbers_of(piece)] for piece in self._pieces(new.tolist())
            ]
        self._known = known
        return known[ids].T
