"""What a prompt shows that makes reuse risky for it, in the words of the report. What was measured is in docs/quality.md, "Where reuse should not be used"."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cachetune_rag.text.prompts.continuations import Continuation
from cachetune_rag.text.prompts.segments import Span
from cachetune_rag.text.prompts.shape import NOTHING_SEEN, Shape

LEAST = 0.15
"""Below this ratio, more right answers are lost where much stands behind the chunks, and in chunks that are code or tables, or nearly the same."""
BEHIND = 128
"""Tokens behind the last chunk that are more than a question and what a template adds."""
CODE = 0.6
"""From this share of their letters on, chunks count as code or tables. Of prose, hardly any prompt has as much, also where it speaks of code."""


@dataclass(frozen=True)
class CutSentences:
    """What became of the sentences that go on from one chunk of a prompt to the next.

    Attributes:
        recomputed: tokens of stored chunks that are the rest of such a sentence, and were recomputed.
        torn: how many of these sentences have some of their rest reused.
    """

    recomputed: int
    torn: int


def cut_sentences(
    stored: Sequence[Span], continuations: Sequence[Continuation], computed: NDArray[np.bool_]
) -> CutSentences:
    """What became of a prompt's cut sentences.

    Args:
        stored: the stored chunks.
        continuations: the sentences.
        computed: bool [length], the tokens that were computed.
    """
    starts = {span.start for span in stored}
    rests = [computed[rest.start : rest.stop] for _, rest in continuations if rest.start in starts]
    return CutSentences(sum(int(rest.sum()) for rest in rests), sum(not rest.all() for rest in rests))


def advice_of(
    cut: CutSentences,
    chunks: int,
    ratio: float | None = 1.0,
    behind: int = 0,
    look: Callable[[], Shape] = lambda: NOTHING_SEEN,
) -> tuple[str, ...]:
    """Why to doubt that the answer stays right, and what to do about it; nothing for most prompts.

    Args:
        cut: what became of sentences that chunks cut in two.
        chunks: how many of the prompt's chunks are stored.
        ratio: the share of their tokens that was to be recomputed; 1 if nothing was reused, None if the selector takes no ratio and recomputes nothing.
        behind: tokens behind the last of all its chunks.
        look: looks at the stored chunks' text, which takes time, so it is asked only where what it finds matters.
    """
    said = []
    if cut.torn:
        said.append(
            f"{cut.torn} of {chunks} stored chunks {'seems' if cut.torn == 1 else 'seem'} to go on with a sentence, a row or a line which the chunk before began, and not all of the "
            "rest of it was recomputed: a fact that is cut there is easily lost. Split texts at ends of sentences and lines, or use a higher ratio for them."
        )
    if ratio is not None and ratio >= LEAST:
        return tuple(said)
    little, use = (
        ("nothing of the chunks is recomputed", "a selector that recomputes, and ")
        if ratio is None
        else (f"ratio is {ratio:g}", "")
    )
    instead = f"Use {use}a ratio of at least {LEAST:g} for such prompts."
    if behind > BEHIND:
        said.append(
            f"{behind} tokens stand behind the last chunk, and {little}: with earlier questions and answers there, facts are lost more often "
            f"than with a question alone. {instead}"
        )
    shape = look()
    if shape.code >= CODE:
        said.append(
            f"Most of the stored chunks' text is code or rows of tables, and {little}: facts there are lost more often than in prose. {instead}"
        )
    if shape.alike:
        said.append(
            f"{shape.alike} of {chunks} stored chunks are nearly the same as another one, and {little}: what differs between them is confused more often "
            f"than other facts. {instead}"
        )
    return tuple(said)
