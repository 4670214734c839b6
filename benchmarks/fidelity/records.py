"""What is evaluated: prompts of real text, each with the tokens that really follow."""

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
        target: token ids of the continuation that models are compared on.
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
        """Changes with the content: rows of another text under the same name are not taken for this record's."""
        text = repr((self.chunks, self.query, self.target, self.answers))
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Dataset:
    """Records that share a layout, and texts of the same corpus that none of them holds.

    Attributes:
        name: of the set.
        records: in the order in which they are evaluated.
        leads: texts to take lead-ins from.
        prefix: text before the chunks.
        separator: text between the chunks.
        continues: the prompt breaks off behind `query`, so that the target continues it; otherwise `query` is a question in
            the engine's standard prompt and the target an answer.
    """

    name: str
    records: tuple[Record, ...]
    leads: tuple[str, ...]
    prefix: str
    separator: str = "\n\n"
    continues: bool = False

    @property
    def digest(self) -> str:
        """Changes with what all records share."""
        return hashlib.sha256(repr((self.leads, self.prefix, self.separator)).encode()).hexdigest()[:12]

    def prompt(self, prompts: PromptBuilder, record: Record) -> Prompt:
        """The token ids of a record's prompt."""
        if not self.continues:
            return prompts.build(query=record.query, chunks=record.chunks, prefix=self.prefix)
        # The layout up to the last chunk is the engine's own; what it puts behind the query would come between the text
        # and its continuation.
        built = prompts.build(query="", chunks=record.chunks, prefix=self.prefix)
        return replace(built, ids=(*built.ids[: built.spans[-1].end], *prompts.encode(record.query)))


def slice_of(items: Sequence[Record], first: int, count: int, kept: int, what: str) -> tuple[Record, ...]:
    """`count` records from number `first` on, if at least `kept` others stay over.

    Raises:
        ValueError: there are too few.
    """
    if first < 0 or count < 1 or first + count + kept > len(items):
        raise ValueError(
            f"{what} has {len(items)} usable records, and records {first} to {first + count} were asked for beside {kept} "
            f"that only give lead-ins: ask for at most {max(0, len(items) - kept - first)} (or a smaller first record)."
        )
    return tuple(items[first : first + count])
