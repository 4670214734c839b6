"""What is evaluated: prompts of real text, and the tokens that follow in the text."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from cachetune_rag.text.prompts.prompt import Chunk, Prompt, PromptBuilder, Text

from .forms import PLAIN, Laid, Turn, conversation


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
        form: in which form its chunks are. A record has the same name in all forms that are made of it.
        before: text of a system prompt.
        turns: what was said between the chunks and the query.
    """

    name: str
    source: str
    chunks: tuple[str, ...]
    query: str
    target: tuple[int, ...]
    answers: tuple[str, ...] = ()
    form: str = PLAIN
    before: str = ""
    turns: tuple[Turn, ...] = ()

    @property
    def laid(self) -> Laid:
        """The parts that forms change."""
        return Laid(self.chunks, self.before, self.turns)

    @property
    def digest(self) -> str:
        """A digest of the content, so that rows of another text or form with the same name are not taken for this record's."""
        text: tuple[Any, ...] = (self.chunks, self.query, self.target, self.answers)
        if self.form != PLAIN:
            text += (self.form, self.before, self.turns)
        return hashlib.sha256(repr(text).encode()).hexdigest()[:12]


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
        spare: texts of the same corpus that are in no record, nor among `leads`: for system prompts.
    """

    name: str
    records: tuple[Record, ...]
    leads: tuple[str, ...]
    prefix: str
    separator: str = "\n\n"
    continues: bool = False
    spare: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """A digest of what all records have in common."""
        return hashlib.sha256(repr((self.leads, self.prefix, self.separator)).encode()).hexdigest()[:12]

    def prompt(self, prompts: PromptBuilder, record: Record) -> Prompt:
        """The token ids of a record's prompt."""
        if record.before or record.turns:
            last = Chunk(record.query) if self.continues else Text(f"Question: {record.query}")
            built = prompts.build_messages(conversation(record.laid, self.prefix, self.separator, last))
            return _up_to_last_chunk(built) if self.continues else built
        if not self.continues:
            return prompts.build(query=record.query, chunks=record.chunks, prefix=self.prefix)
        # The engine lays out the prompt up to the last chunk. What it would put behind the query is left out, because it would
        # stand between the text and its continuation.
        built = prompts.build(query="", chunks=record.chunks, prefix=self.prefix)
        return replace(built, ids=(*built.ids[: built.spans[-1].end], *prompts.encode(record.query)))


def _up_to_last_chunk(prompt: Prompt) -> Prompt:
    """A prompt that ends with its last chunk, which becomes text like any other."""
    return replace(
        prompt,
        ids=prompt.ids[: prompt.spans[-1].end],
        spans=prompt.spans[:-1],
        chunk_ids=prompt.chunk_ids[:-1],
        chunk_texts=prompt.chunk_texts[:-1],
        chunk_documents=prompt.chunk_documents[:-1],
        chunk_found=prompt.chunk_found[:-1],
        chunk_since=prompt.chunk_since[:-1],
    )


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
