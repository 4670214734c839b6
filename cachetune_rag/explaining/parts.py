"""Cuts a prompt into what stands before its chunks, the chunks, what stands between them, and the query."""

from __future__ import annotations

from collections.abc import Iterator

from cachetune_rag.explaining.explanation import Part, Run
from cachetune_rag.explaining.spelling import Spelling
from cachetune_rag.reuse.account import Account, runs_of
from cachetune_rag.text.prompts.prompt import Prompt


def parts_of(prompt: Prompt, account: Account, spelling: Spelling) -> list[Part]:
    """The parts of a prompt, in order; together they have all of its tokens, and every chunk that has tokens."""
    return [
        Part(
            kind,
            start,
            tuple(
                Run(fate.value, last - first, spelling.text(first, last))
                for first, last, fate in runs_of(account.fates, start, end)
            ),
            chunk,
        )
        for kind, start, end, chunk in _stretches(prompt)
        if start < end
    ]


def _stretches(prompt: Prompt) -> Iterator[tuple[str, int, int, int | None]]:
    """Kind, start, end and number of the chunk."""
    at = 0
    for span in prompt.spans:
        yield ("between" if at else "prefix"), at, span.start, None
        yield "chunk", span.start, span.end, span.chunk
        at = span.end
    yield "query", at, len(prompt.ids), None
