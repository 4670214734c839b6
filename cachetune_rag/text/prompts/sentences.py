"""Which sentence each token of a prompt's chunks belongs to.

It is told by token ids alone, so every way to make a prompt, and every process that has a part of the model, finds the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cachetune_rag.text.prompts.continuations import Pieces
from cachetune_rag.text.prompts.segments import Prompt
from cachetune_rag.text.prompts.sentence_ends import CLOSING, MARKS, OTHER_MARKS

MOST_TOKENS = 64
"""Most tokens of a sentence. What goes on for longer, a table or code, say, is cut into pieces of so many."""
NONE = -1
"""The number of a token that is in no chunk."""
_ENDS = re.compile(rf"[.{MARKS}{OTHER_MARKS}:;]{CLOSING} *\Z|\n")
"""The end of a token that ends a sentence. Here colons, semicolons, line breaks and full stops of initials end one as well, other than where a cut sentence is
looked for (`continuations.py`): a part of a sentence or a line of a table can be recomputed by itself, but what a chunk goes on with has to be followed to its end."""

FindSentences = Callable[[Prompt], NDArray[np.int64]]
"""Numbers the sentences of a prompt: int64 [length], ascending from 0, `NONE` where no chunk is."""


def no_sentences(prompt: Prompt) -> NDArray[np.int64]:
    """None: for prompts of token ids that spell no text."""
    return np.full(len(prompt.ids), NONE, np.int64)


class Sentences:
    """Finds sentences (`FindSentences`). Each ends in its chunk. Safe to use from many threads.

    Args:
        tokenizer: the model's; nothing may change it.
    """

    def __init__(self, tokenizer: Any):
        self._pieces = Pieces(tokenizer)
        # Of each token of the vocabulary: 1 if it ends a sentence, 0 if not, -1 if nobody asked yet.
        self._known = np.empty(0, np.int8)

    def __call__(self, prompt: Prompt) -> NDArray[np.int64]:
        """Those of a prompt."""
        ids = np.array(prompt.ids, np.int64)
        inside, begins = np.zeros(len(ids), np.bool_), np.zeros(len(ids), np.bool_)
        for span in prompt.spans:
            inside[span.start : span.end] = True
            begins[span.start : span.start + 1] = True
        begins[1:] |= self._ends(ids)[:-1]
        begins &= inside
        numbers = np.where(inside, np.cumsum(begins) - 1, NONE)
        starts = np.flatnonzero(begins)
        # How far each token is from its sentence's first one tells where a long sentence is cut.
        since = np.arange(len(ids)) - np.where(inside, starts[numbers] if len(starts) else 0, 0)
        cut = inside & (since > 0) & (since % MOST_TOKENS == 0)
        return np.where(inside, np.cumsum(begins | cut) - 1, NONE)

    def _ends(self, ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        known = self._known
        if len(ids) and int(ids.max()) >= len(known):
            known = np.full(int(ids.max()) + 1, -1, np.int8)
            known[: len(self._known)] = self._known
        new = np.unique(ids[known[ids] < 0]) if len(ids) else ids
        if len(new):
            known = known.copy()  # another thread may be reading the one that was there
            known[new] = [bool(_ENDS.search(piece)) for piece in self._pieces(new.tolist())]
        self._known = known
        return known[ids] == 1
