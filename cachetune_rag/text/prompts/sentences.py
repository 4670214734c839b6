"""Which sentence each token of a prompt's chunks belongs to.

It is told by token ids alone, so every way to make a prompt, and every process that has a part of the model, finds the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cachetune_rag.text.prompts.continuations import Pieces
from cachetune_rag.text.prompts.segments import Prompt
from cachetune_rag.text.prompts.sentence_ends import CLOSING, MARKS, OTHER_MARKS
from cachetune_rag.text.prompts.token_table import TokenTable

MOST_TOKENS = 64
"""Most tokens of a sentence. What goes on for longer, a table or code, say, is cut into pieces of so many."""
NONE = -1
"""The number of a token that is in no chunk."""
_OTHER_STOPS = OTHER_MARKS + "：；"
_STOP = re.compile(rf"[.{MARKS}:;]{CLOSING}\Z")
"""The end of a token that ends a sentence if a blank follows. Numbers, times, names of files and addresses have these marks within. Here colons, semicolons, line breaks
and full stops of initials end a sentence, other than where a cut one is looked for (`continuations.py`): a part of a sentence or a line of a table can be recomputed by
itself, but what a chunk goes on with has to be followed to its end."""
_OTHER_STOP = re.compile(rf"[{_OTHER_STOPS}]{CLOSING}\Z")
"""The end of a token that ends a sentence whatever follows, but for what closes the sentence."""
_BREAK = re.compile(rf"\n|[.{MARKS}{_OTHER_STOPS}:;]{CLOSING}[^\S\n]+\Z")
"""A token behind which the next sentence begins."""
_CLOSES = re.compile(rf"{CLOSING}\Z")

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
        self._kinds = TokenTable(self._pieces, _kinds_of, len(_Kinds._fields))
        # Marks that no single token spells, as in vocabularies of bytes.
        self._spelled = [ids for ids in map(self._pieces.ids, _OTHER_STOPS) if len(ids) > 1]

    def __call__(self, prompt: Prompt) -> NDArray[np.int64]:
        """Those of a prompt."""
        ids = prompt.ids_array
        inside, begins = np.zeros(len(ids), np.bool_), np.zeros(len(ids), np.bool_)
        for span in prompt.spans:
            inside[span.start : span.end] = True
            begins[span.start : span.start + 1] = True
        begins[1:] |= self._between(ids)
        begins &= inside
        numbers = np.where(inside, np.cumsum(begins) - 1, NONE)
        starts = np.flatnonzero(begins)
        # How far each token is from its sentence's first one tells where a long sentence is cut.
        since = np.arange(len(ids)) - np.where(inside, starts[numbers] if len(starts) else 0, 0)
        cut = inside & (since > 0) & (since % MOST_TOKENS == 0)
        return np.where(inside, np.cumsum(begins | cut) - 1, NONE)

    def _between(self, ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether a sentence begins at each token but the first, by what stands before it."""
        kinds = _Kinds(*(self._kinds(ids) == 1))
        other = kinds.other
        for mark in self._spelled:
            ends = len(mark) - 1
            found = [ids[at : len(ids) - ends + at] == token for at, token in enumerate(mark)]
            other[ends:] |= np.logical_and.reduce(found)
        # What closes a sentence belongs to the mark before it.
        mark_before = np.maximum.accumulate(np.where(kinds.closes, 0, np.arange(len(ids))))[:-1]
        stopped = kinds.stop[mark_before] & kinds.blank[1:]
        return np.asarray(kinds.breaks[:-1] | stopped | (other[mark_before] & ~kinds.closes[1:]), np.bool_)


class _Kinds(NamedTuple):
    """What tokens are, each bool [tokens]: whether they end in a mark, or in one of a script without blanks; end a sentence by themselves; only close what a mark ended
    (line breaks, too, belong to the sentence before them); begin with a blank."""

    stop: NDArray[np.bool_]
    other: NDArray[np.bool_]
    breaks: NDArray[np.bool_]
    closes: NDArray[np.bool_]
    blank: NDArray[np.bool_]


def _kinds_of(piece: str) -> tuple[bool, bool, bool, bool, bool]:
    ends = bool(_STOP.search(piece)), bool(_OTHER_STOP.search(piece)), bool(_BREAK.search(piece))
    line_break = "\n" in piece
    closes = bool(piece) and bool(_CLOSES.match(piece) or (line_break and not piece.strip()))
    return *ends, closes, piece[:1].isspace() and not line_break
