"""Real prose around the facts of training text, and the questions of MuSiQue that a reader is trained on."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from pathlib import Path

from fidelity.musique import LEADS, read_questions
from fidelity.sources import installed_sources
from tasks_of.haystack import reference_sentences

from .squad import Barred

SHORTEST, LONGEST = 30, 300
"""Characters of a sentence."""


@dataclass(frozen=True)
class RealQuestion:
    """A question, its accepted answers, its passages, and what it goes through before its answer, where that is known."""

    question: str
    answers: tuple[str, ...]
    passages: tuple[str, ...]
    steps: tuple[str, ...] = ()

    @property
    def answering(self) -> tuple[str, ...]:
        """The passages that have an accepted answer in them."""
        return tuple(p for p in self.passages if any(a.casefold() in p.casefold() for a in self.answers))

    @property
    def is_told(self) -> bool:
        """Whether an accepted answer, and each step, is in a passage."""
        steps = (any(step.casefold() in p.casefold() for p in self.passages) for step in self.steps)
        return bool(self.answering) and all(steps)

    @property
    def needed(self) -> tuple[str, ...]:
        """The passages that have an accepted answer or a step in them."""
        words = (*self.answers, *self.steps)
        return tuple(p for p in self.passages if any(w.casefold() in p.casefold() for w in words))


@dataclass(frozen=True)
class Split:
    """The questions of a file that are trained on, and which are held out.

    Attributes:
        trained: the former.
        kept: the passages of all questions that are not trained on.
        first, count: number of the first one that is held out, and how many are, as `quality.py` takes them: `--first`, `--musique-records`.
    """

    trained: list[RealQuestion]
    kept: frozenset[str]
    first: int
    count: int


def docstring_sentences() -> list[str]:
    """Sentences of the docstrings of Python's standard library, each once. None of them stands in the benchmark of tasks."""
    barred = frozenset(reference_sentences())
    found: dict[str, None] = {}
    for text in installed_sources()["docstrings"]:
        for paragraph in re.split(r"\n\s*\n", text.text):
            line = " ".join(paragraph.split())
            if re.match(r"[A-Z]\w* ", line) and line.endswith(".") and not re.search(r">>>|[{}|\\]|--", line):
                found.update(dict.fromkeys(re.split(r"(?<=[.!?]) (?=[A-Z])", line)))
    return [s for s in found if SHORTEST <= len(s) <= LONGEST and s not in barred]


def split_musique(path: Path) -> Split:
    """The questions of a MuSiQue file to train on, and which are held out.

    The first half is trained on; the second half is held out, but for those at the end, which lead-ins are taken from. Passages that a
    question shares with one that is not trained on are left out of it. If no answer is in those that are left, or a step is in none of them,
    nothing but guessing could be learned of it, so it is left out whole.

    Raises:
        ValueError: there are too few questions.
    """
    questions = [RealQuestion(q, tuple(a), tuple(p), tuple(steps)) for q, a, p, _, steps in read_questions(path)]
    first = (len(questions) - LEADS) // 2
    if first < 1:
        raise ValueError(
            f"{path} has {len(questions)} questions, and {LEADS} only give lead-ins: give a file with more."
        )
    kept = frozenset(passage for q in questions[first:] for passage in q.passages)
    own = [tuple(p for p in q.passages if p not in kept) for q in questions[:first]]
    left = [RealQuestion(q.question, q.answers, p, q.steps) for q, p in zip(questions, own, strict=False)]
    return Split([q for q in left if q.is_told], kept, first, len(questions) - LEADS - first)


def further_questions(path: Path, barred: Barred) -> list[RealQuestion]:
    """All questions of a file in MuSiQue's form, without passages that share eight words in a row with a barred text. A question that no
    passage answers then, or whose steps they don't have, is left out.

    Raises:
        ValueError: nothing is left, or a line can't be read.
    """
    lines = list(read_questions(path))
    apart = {p for p in dict.fromkeys(p for line in lines for p in line.passages) if not barred.shares(p)}
    questions = [
        RealQuestion(question, tuple(answers), tuple(p for p in passages if p in apart), tuple(steps))
        for question, answers, passages, _, steps in lines
    ]
    if not (left := [q for q in questions if q.is_told]):
        raise ValueError(f"{path} has no question with an answer in a passage that isn't measured on.")
    return left


def passage_sentences(questions: list[RealQuestion]) -> list[str]:
    """The sentences of the passages of questions, each once."""
    texts = dict.fromkeys(passage for q in questions for passage in q.passages)
    found = dict.fromkeys(s for text in texts for s in re.split(r"(?<=[.!?]) ", " ".join(text.split())))
    return [s for s in found if SHORTEST <= len(s) <= LONGEST]


class Strand:
    """Sentences in the order of a text, from any place on."""

    def __init__(self, sentences: list[str], rng: random.Random):
        self._sentences, self._at = sentences, rng.randrange(len(sentences))

    def next(self) -> str:
        """The next sentence. After the last one comes the first."""
        self._at = (self._at + 1) % len(self._sentences)
        return self._sentences[self._at]
