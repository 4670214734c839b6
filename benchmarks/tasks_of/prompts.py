"""The prompts of the benchmark: which there are, and how each is made. The same seed gives the same prompts."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fidelity.records import Dataset

from cachetune_rag.text.prompts.prompt import INSTRUCTIONS, Prompt, PromptBuilder

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
    """

    kind: str
    length: int
    near_duplicates: str

    def __str__(self) -> str:
        return f"{self.kind}, {self.length:,} tokens, {self.near_duplicates} near-duplicates"


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
        planted: where each fact stands.
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

    @property
    def digest(self) -> str:
        """A digest of the content, so that rows of another text with the same name are not taken for this prompt's."""
        rule = (self.rule.wanted, sorted(self.rule.values), self.rule.ordered)
        return hashlib.sha256(repr((self.chunks, self.query, rule, self.answer_tokens)).encode()).hexdigest()[:12]


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
        self.haystack = Haystack(sentences, self._prompts.encode)
        self.dataset = Dataset("tasks", (), self.haystack.leads, INSTRUCTIONS)
        """What all prompts have in common."""

    def task(self, cell: Cell, number: int) -> Task:
        """A cell's prompt of a number. It doesn't depend on which others are made.

        Raises:
            ValueError: the cell has no room for its facts, whatever the sizes of chunks.
        """
        rng = random.Random(f"{self._seed} {cell} {number}")
        names = Names(rng, self.haystack.words)
        question = KINDS[cell.kind](rng, names, cell.near_duplicates == "with")
        shapes = self._fitting(cell, question)
        chunk_tokens, place = shapes[number % len(shapes)]
        count = self._chunks(cell, question, chunk_tokens)
        encode = self._prompts.encode
        chunks, planted = lay_out(question.facts, place, count, chunk_tokens, self.haystack, encode, rng)
        name = f"{cell.kind}-{cell.length}-{cell.near_duplicates}-{number}"
        return Task(
            name, cell, chunk_tokens, place, chunks, question.query, question.rule, question.answer_tokens, planted
        )

    def prompt(self, task: Task) -> Prompt:
        """The token ids of a prompt."""
        return self._prompts.build(query=task.query, chunks=task.chunks, prefix=self.dataset.prefix)

    def _chunks(self, cell: Cell, question: Question, chunk_tokens: int) -> int:
        """How many chunks there are, so that prompt and answer have the cell's length at most."""
        bare = len(self._prompts.build(query=question.query, chunks=["."], prefix=self.dataset.prefix).ids)
        room = cell.length - bare - question.answer_tokens
        return room // (chunk_tokens + len(self._prompts.separator_ids))

    def _fitting(self, cell: Cell, question: Question) -> list[tuple[int, str]]:
        """Sizes of chunks and places with which the question's facts fit, in an order of the cell's own. There are two chunks at least."""
        found = [
            (tokens, place)
            for tokens, place in self._shapes
            if self._chunks(cell, question, tokens) >= max(2, chunks_needed(question.facts, place))
        ]
        if not found:
            raise ValueError(
                f"{cell}: there is no room for the facts in chunks of {', '.join(str(t) for t, _ in self._shapes)} tokens: use larger "
                "--lengths or smaller --chunk-tokens."
            )
        random.Random(f"{self._seed} {cell}").shuffle(found)
        return found
