"""The prompts of the benchmark: which there are, and how each is made. The same seed gives the same prompts."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from fidelity.forms import FORMS, PLAIN, Laid, Turn, conversation, system_text
from fidelity.records import Dataset

from cachetune_rag.text.prompts.prompt import INSTRUCTIONS, Prompt, PromptBuilder, Text

from .contents import CONTENTS, as_row, material_of
from .haystack import Haystack
from .kinds import KINDS
from .layout import PLACES, Planted, chunks_needed, lay_out
from .names import Names
from .questions import Question, Rule

LENGTHS = (1024, 2048, 4096, 8192)
CHUNK_TOKENS = (128, 256, 512)
NEAR_DUPLICATES = ("without", "with")


@dataclass(frozen=True, order=True)
class Cell:
    """Prompts that are counted together.

    Attributes:
        kind: what is asked.
        length: the most tokens that prompt and answer have together.
        near_duplicates: "with" or "without": whether facts stand in the prompt that are nearly those that are asked for.
        form: one of `FORMS`. What it adds to a prompt comes on top of the length.
    """

    kind: str
    length: int
    near_duplicates: str
    form: str = PLAIN

    def __str__(self) -> str:
        form = "" if self.form == PLAIN else f", {self.form}"
        return f"{self.kind}, {self.length:,} tokens, {self.near_duplicates} near-duplicates{form}"

    @property
    def plain(self) -> Cell:
        """The cell of the same prompts in the plain form."""
        return replace(self, form=PLAIN)


@dataclass(frozen=True)
class Task:
    """One prompt with a right answer.

    Attributes:
        name: unique.
        cell: what it is counted with.
        chunk_tokens: the most tokens of each chunk.
        place: where the needed facts stand.
        chunks: texts of the chunks, in prompt order.
        query: the question.
        rule: when an answer is right.
        answer_tokens: the most tokens that an answer gets.
        planted: where each fact stands in the plain form. The chunks of another one may be more or longer.
        before: text of a system prompt.
        turns: what was said between the chunks and the question.
    """

    name: str
    cell: Cell
    chunk_tokens: int
    place: str
    chunks: tuple[str, ...]
    query: str
    rule: Rule
    answer_tokens: int
    planted: tuple[Planted, ...]
    before: str = ""
    turns: tuple[Turn, ...] = ()

    @property
    def digest(self) -> str:
        """A digest of the content, so that rows of another text with the same name are not taken for this prompt's."""
        rule = (self.rule.wanted, sorted(self.rule.values), self.rule.ordered)
        text: tuple[Any, ...] = (self.chunks, self.query, rule, self.answer_tokens)
        if self.before or self.turns:
            text += (self.before, self.turns)
        return hashlib.sha256(repr(text).encode()).hexdigest()[:12]


class TaskMaker:
    """Makes prompts of one tokenizer.

    Args:
        tokenizer: the model's.
        sentences: the prose of the haystack, in order.
        chunk_tokens: sizes of chunks. Prompts of a cell take turns at those, and at the places of facts.
        places: where needed facts stand.
        seed: all that is drawn depends on it.
    """

    def __init__(
        self,
        tokenizer: Any,
        sentences: Sequence[str],
        chunk_tokens: Sequence[int] = CHUNK_TOKENS,
        places: Sequence[str] = PLACES,
        seed: int = 0,
    ):
        self._prompts = PromptBuilder(tokenizer)
        self._shapes = [(tokens, place) for tokens in chunk_tokens for place in places]
        self._seed = seed
        self._others: dict[str, Haystack] = {}
        self.haystack = Haystack(sentences, self._prompts.encode)
        self.dataset = Dataset("tasks", (), self.haystack.leads, INSTRUCTIONS)
        """What all prompts of prose have in common."""

    def dataset_of(self, cell: Cell) -> Dataset:
        """What all prompts of a cell have in common with those of other ones."""
        haystack = self._haystack(cell)
        return self.dataset if haystack is self.haystack else replace(self.dataset, leads=haystack.leads)

    def task(self, cell: Cell, number: int) -> Task:
        """A cell's prompt of a number. It doesn't depend on which others are made.

        Raises:
            ValueError: the cell has no room for its facts, whatever the sizes of chunks.
        """
        # A number's facts are the same in all forms, so that forms can be compared in pairs.
        whole, cell, form = cell, cell.plain, FORMS[cell.form]
        haystack = self._haystack(whole)
        rng = random.Random(f"{self._seed} {cell} {number}")
        names = Names(rng, self.haystack.words)
        question = KINDS[cell.kind](rng, names, cell.near_duplicates == "with")
        room = self._room(cell, question)
        shapes = self._fitting(cell, question, room)
        chunk_tokens, place = shapes[number % len(shapes)]
        count = self._chunks(room, chunk_tokens)
        encode = self._prompts.encode
        facts = tuple(map(as_row, question.facts)) if form.content == "tables" else question.facts
        between = " " if haystack is self.haystack else "\n"
        chunks, planted = lay_out(facts, place, count, chunk_tokens, haystack, encode, rng, between)
        laid = form.change(Laid(chunks), material_of(chunks, planted, lambda: self._system_text))
        name = f"{cell.kind}-{cell.length}-{cell.near_duplicates}-{number}"
        name += "" if whole.form == PLAIN else f"-{whole.form}"
        return Task(
            name,
            whole,
            chunk_tokens,
            place,
            laid.chunks,
            question.query,
            question.rule,
            question.answer_tokens,
            planted,
            laid.before,
            laid.turns,
        )

    def prompt(self, task: Task) -> Prompt:
        """The token ids of a prompt."""
        prefix = self.dataset.prefix
        if not task.before and not task.turns:
            return self._prompts.build(query=task.query, chunks=task.chunks, prefix=prefix)
        laid = Laid(task.chunks, task.before, task.turns)
        return self._prompts.build_messages(conversation(laid, prefix, "\n\n", Text(f"Question: {task.query}")))

    def _haystack(self, cell: Cell) -> Haystack:
        content = FORMS[cell.form].content
        if content == "prose":
            return self.haystack
        if content not in self._others:
            self._others[content] = Haystack(CONTENTS[content](), self._prompts.encode)
        return self._others[content]

    @cached_property
    def _system_text(self) -> str:
        """A system prompt's, from the texts that lead-ins are taken from, which are in no chunk."""
        return system_text(self.haystack.leads, self._prompts.encode, self.dataset.name)

    def _room(self, cell: Cell, question: Question) -> int:
        """How many tokens chunks and separators have, so that prompt and answer have the cell's length at most."""
        bare = len(self._prompts.build(query=question.query, chunks=["."], prefix=self.dataset.prefix).ids)
        return cell.length - bare - question.answer_tokens

    def _chunks(self, room: int, chunk_tokens: int) -> int:
        """How many chunks there are."""
        return room // (chunk_tokens + len(self._prompts.separator_ids))

    def _fitting(self, cell: Cell, question: Question, room: int) -> list[tuple[int, str]]:
        """Sizes of chunks and places with which the question's facts fit, in an order of the cell's own. There are two chunks at least."""
        found = [
            (tokens, place)
            for tokens, place in self._shapes
            if self._chunks(room, tokens) >= max(2, chunks_needed(question.facts, place))
        ]
        if not found:
            raise ValueError(
                f"{cell}: there is no room for the facts in chunks of {', '.join(str(t) for t, _ in self._shapes)} tokens: use larger "
                "--lengths or smaller --chunk-tokens."
            )
        random.Random(f"{self._seed} {cell}").shuffle(found)
        return found
