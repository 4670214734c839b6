"""What is evaluated: prompts of real text, and the tokens that follow in the text."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from cachetune_rag.text.prompts.prompt import Prompt, PromptBuilder


@dataclass(frozen=True)
class Record:
    """One prompt and its continuation.

    Attributes:
        name: unique in its set.
        source: where its text comes from.
        chunks: texts of the passages, in prompt order.
        query: what stands behind them.
        target: token ids of the continuation on which reuse is compared with full prefill.
        answers: accepted answers, where the query is a question.
    """

    name: str
    source: str
    chunks: tuple[str, ...]
    query: str
    target: tuple[int, ...]
    answers: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """A digest of the content, so that rows of another text with the same name are not taken for this record's."""
        text = repr((self.chunks, self.query, self.target, self.answers))
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Dataset:
    """Records that are laid out alike, and texts of the same corpus that are in none of them.

    Attributes:
        name: the set's name.
        records: the records, in the order in which they are evaluated.
        leads: texts to take lead-ins from.
        prefix: text before the chunks.
        separator: text between the chunks.
        continues: True if the prompt ends behind `query`, so that the target continues it. Otherwise `query` is a question in the engine's
            standard prompt, and the target is an answer.
    """

    name: str
    records: tuple[Record, ...]
    leads: tuple[str, ...]
    prefix: str
    separator: str = "\n\n"
    continues: bool = False

    @property
    def digest(self) -> str:
        """A digest of what all records have in common."""
        return hashlib.sha256(repr((self.leads, self.prefix, self.separator)).encode()).hexdigest()[:12]

    def prompt(self, prompts: PromptBuilder, record: Record) -> Prompt:
        """The token ids of a record's prompt."""
        if not self.continues:
            return prompts.build(query=record.query, chunks=record.chunks, prefix=self.prefix)
        # The engine lays out the prompt up to the last chunk. What it would put behind the query is left out, because it would
        # stand between the text and its continuation.
        built = prompts.build(query="", chunks=record.chunks, prefix=self.prefix)
        return replace(built, ids=(*built.ids[: built.spans[-1].end], *prompts.encode(record.query)))


def slice_of(items: Sequence[Record], first: int, count: int, kept: int, what: str) -> tuple[Record, ...]:
    """`count` records from number `first` on, if at least `kept` others are left.

    Raises:
        ValueError: there are too few.
    """
    if first < 0 or count < 1 or first + count + kept > len(items):
        raise ValueError(
            f"{what} has {len(items)} usable records, and records {first} to {first + count} were asked for beside {kept} "
            f"that only give lead-ins: ask for at most {max(0, len(items) - kept - first)} (or a smaller first record)."
        )
    return tuple(items[first : first + count])
