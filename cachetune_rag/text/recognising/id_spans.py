"""Chunks that were found in a prompt's token ids, and the `Prompt` that they make of those ids."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from cachetune_rag.errors import PromptError
from cachetune_rag.text.prompts.segments import Prompt, Span


class IdSpan(NamedTuple):
    """Tokens [start, end) of a prompt are those of a chunk, all of it or all but a few at its edges.

    The tokens in between are not part of it, since they stand in the prompt: so it is cheap to send to another process.

    Attributes:
        start, end: places in the prompt.
        key: the key under which the chunk was made known.
        head: the chunk's tokens before `start`, which the prompt has in another form or not at all; three at most.
        tail: the chunk's tokens from `end` on, likewise.
    """

    start: int
    end: int
    key: Hashable
    head: tuple[int, ...] = ()
    tail: tuple[int, ...] = ()

    def chunk_ids(self, prompt_ids: Sequence[int]) -> tuple[int, ...]:
        """All token ids of the chunk, as it is stored."""
        return (*self.head, *prompt_ids[self.start : self.end], *self.tail)


def without_beginning(prompt: Prompt, count: int) -> Prompt:
    """The prompt without the chunks, and parts of chunks, that stand in its first `count` tokens: these are computed like any others."""
    spans = tuple(
        span if span.start >= count else replace(span, start=count, first=span.first + count - span.start)
        for span in prompt.spans
        if span.end > count
    )
    passed = tuple(span for span in prompt.spans if span.end <= count)
    return replace(prompt, spans=spans, passed=(*prompt.passed, *passed))


def prompt_of_ids(
    prompt_ids: Sequence[int], found: Sequence[IdSpan], texts: Mapping[Hashable, str] | None = None
) -> Prompt:
    """Make a `Prompt` of token ids and the chunks that were found in them.

    Tokens that the prompt has in place of a chunk's `head` and `tail` are computed, like everything outside of the spans.

    Args:
        prompt_ids: the whole prompt.
        found: its chunks, in order.
        texts: texts of chunks by their keys, for chunks that the store may not know. If such a chunk turns out not to be stored, it can
            be stored behind the request; so can one whose text the store knows, because a document holds it.

    Raises:
        PromptError: the spans overlap, are not in order, or don't lie in the prompt.
    """
    ids = tuple(prompt_ids)
    texts = {} if texts is None else texts
    spans: list[Span] = []
    at = 0
    for number, span in enumerate(found):
        if not at <= span.start < span.end <= len(ids):
            raise PromptError(
                f"chunk {number} was found at tokens {span.start} to {span.end} of a prompt of {len(ids)} tokens, and the one before it "
                f"ends at {at}: give spans in order that don't overlap, of one token at least."
            )
        at = span.end
        spans.append(Span(span.start, span.end, number, first=len(span.head)))
    return Prompt(
        ids,
        tuple(spans),
        chunk_ids=tuple(span.chunk_ids(ids) for span in found),
        chunk_texts=tuple(texts.get(span.key, "") for span in found),
        recognised=sum(span.key not in texts for span in found),
        chunk_found=tuple(span.key not in texts for span in found),
    )
