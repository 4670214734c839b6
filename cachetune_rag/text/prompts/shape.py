"""What kind of text a prompt's chunks are, as far as reuse is known to lose more of it: code and tables, and chunks that are nearly the same.

It is told by token ids alone, in about a millisecond for a long prompt.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cachetune_rag.text.prompts.continuations import Pieces
from cachetune_rag.text.prompts.segments import Prompt, Span
from cachetune_rag.text.prompts.token_table import TokenTable

_MARKS = re.compile(r"[\[\]{}<>=;|\t)]|_+|(?<!\s)\(")
"""Marks of code and of rows. A blank stands before a bracket of prose, and none before one that calls a function."""
_MARKS_IN_LINE = 0.05
"""A line of code or of a table has at least so many of these marks, as a share of all that isn't blank."""
_RUN = 6
"""Tokens in a row that two chunks have in common."""
_RUNS = 4096
"""About the most of a prompt's runs that are compared: in a longer prompt, a part of them in all chunks alike."""
_FEWEST_RUNS = 8
"""The fewest runs of a chunk that is compared."""
_SAME = 0.6
"""Two chunks are nearly the same if they have this share of their runs in common. Windows that overlap by half have less, and so has a passage that stands within a longer chunk."""
_IN_A_ROW = 16
"""Of how many chunks that have the same run each is compared with each other one."""


class Shape(NamedTuple):
    """What a prompt's chunks look like.

    Attributes:
        code: the share of their letters that stands in lines of code, or in rows of tables.
        alike: how many of them are nearly the same as another one, but not the same.
    """

    code: float
    alike: int


NOTHING_SEEN = Shape(0.0, 0)
FindShape = Callable[[Prompt, Sequence[Span]], Shape]
"""Looks at some of a prompt's chunks."""


def no_shape(prompt: Prompt, spans: Sequence[Span]) -> Shape:
    """Nothing is known: for prompts of token ids that spell no text."""
    return NOTHING_SEEN


class Shapes:
    """Tells what chunks look like (`FindShape`). Safe to use from many threads.

    Args:
        tokenizer: the model's; nothing may change it.
    """

    def __init__(self, tokenizer: Any):
        self._table = TokenTable(Pieces(tokenizer), _numbers_of, 3)

    def __call__(self, prompt: Prompt, spans: Sequence[Span]) -> Shape:
        """What some of a prompt's chunks look like."""
        chunks = [prompt.ids_array[span.start : span.end] for span in spans if span.start < span.end]
        return Shape(self._code(chunks), _alike(chunks))

    def _code(self, chunks: Sequence[NDArray[np.int64]]) -> float:
        if not chunks:
            return 0.0
        letters, marks, breaks = self._table(np.concatenate(chunks))
        begins = np.concatenate([[True], breaks[:-1] > 0])
        begins[np.cumsum([len(chunk) for chunk in chunks])[:-1]] = True
        line = np.cumsum(begins) - 1
        of_line = np.bincount(line, letters)
        code = np.bincount(line, marks) >= np.maximum(_MARKS_IN_LINE * of_line, 1)
        return float(of_line[code].sum() / max(1, of_line.sum()))


def _numbers_of(piece: str) -> tuple[int, int, int]:
    """Of a token: how many letters and marks it has that aren't blank, how many of these are marks of code, and whether a line ends in it."""
    return len("".join(piece.split())), len(_MARKS.findall(piece)), int("\n" in piece)


def _alike(chunks: Sequence[NDArray[np.int64]]) -> int:
    """How many chunks are nearly the same as another one. Those that stand in the prompt twice count once."""
    different = list({chunk.tobytes(): chunk for chunk in chunks}.values())
    if len(different) < 2:
        return 0
    found, whose = _runs(different)
    sizes = np.bincount(whose, minlength=len(different))
    pairs = []
    for apart in range(1, _IN_A_ROW):
        same = found[apart:] == found[:-apart]
        if not same.any():
            break
        pairs.append(whose[:-apart][same] * len(different) + whose[apart:][same])
    if not pairs:
        return 0
    pair, count = np.unique(np.concatenate(pairs), return_counts=True)
    first, second = np.divmod(pair, len(different))
    near = count >= _SAME * np.maximum(np.maximum(sizes[first], sizes[second]), _FEWEST_RUNS)
    return len(set(first[near].tolist()) | set(second[near].tolist()))


def _runs(chunks: Sequence[NDArray[np.int64]]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """A number for each run of tokens, ascending, and the number of the chunk that has it, each run once in a chunk."""
    ids = np.concatenate(chunks)
    whose = np.repeat(np.arange(len(chunks)), [len(chunk) for chunk in chunks])
    count = max(0, len(ids) - _RUN + 1)
    mixed, numbers = np.zeros(count, np.uint64), ids.astype(np.uint64)
    for at in range(_RUN):
        mixed = (mixed ^ (numbers[at : at + count] + np.uint64(1))) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
    every = np.uint64(1 + len(ids) // _RUNS)
    kept = np.flatnonzero((whose[:count] == whose[len(ids) - count :]) & (mixed % every == 0))
    kept = kept[np.argsort(mixed[kept], kind="stable")]
    found, owner = mixed[kept], whose[kept]
    once = np.ones(len(found), np.bool_)
    once[1:] = (found[1:] != found[:-1]) | (owner[1:] != owner[:-1])
    return found[once], owner[once]
