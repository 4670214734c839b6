"""What a prompt shows that makes reuse risky for it, in the words of the report. What was measured is in docs/quality.md."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

from cachetune_rag.text.prompts.segments import Prompt, Span

SAFE_RATIO = 0.3
"""From this ratio on, facts that were cut in two were found about as often as with full prefill."""
_NEAR = 16
"""Most tokens between two chunks that follow each other. A separator has one or two."""
_LOOKED_AT = 300
"""Characters at the end of a chunk that show whether it is prose."""
_SENTENCE_END = re.compile(r"\w[.!?][\"')\]]* +[\"'(\[]*\w")
_CUT = re.compile(r"[\w,;]\Z")


def advice_of(prompt: Prompt, reused: Sequence[Span], ratio: float) -> tuple[str, ...]:
    """Why to doubt that the answer stays right, and what to do about it; nothing for most prompts.

    Args:
        prompt: the prompt.
        reused: the chunks of which rows were reused.
        ratio: the share of their tokens that was recomputed.
    """
    if ratio >= SAFE_RATIO:
        return ()
    kept = frozenset(reused)
    cut = sum(
        second in kept and second.start - first.end <= _NEAR and _goes_on(_text(prompt, first), _text(prompt, second))
        for first, second in pairwise(sorted(prompt.spans, key=lambda span: span.start))
    )
    if not cut:
        return ()
    return (
        f"{cut} of {len(kept)} reused chunks {'begins' if cut == 1 else 'begin'} in the middle of a sentence, the beginning of which stands in "
        f"the chunk before: a fact that is cut there is easily lost. Split texts at ends of sentences, or use a ratio of {SAFE_RATIO} for them.",
    )


def _text(prompt: Prompt, span: Span) -> str:
    return prompt.chunk_texts[span.chunk]


def _goes_on(first: str, second: str) -> bool:
    """Whether a sentence of prose begins in one text and goes on in the next. Scripts without capital letters don't show it."""
    end = first[-_LOOKED_AT:].rstrip()
    return second.lstrip()[:1].islower() and bool(_CUT.search(end)) and bool(_SENTENCE_END.search(end))
