"""Training text of real questions: those of sets with passages of their own, and those on single passages."""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Sequence

from .prose import RealQuestion
from .squad import AskedPassage
from .templates import PREFIXES
from .turns import TOKENS_PER_CHARACTER, Context, Turn, spoken

_TURNS = 16
"""Of a prompt with passages that have questions of their own, at most."""
_QUESTIONS_CHANGED, _PASSAGES_CHANGED = 0.7, 0.5
"""Shares of the prompts whose passages are laid out otherwise (`_laid_out`): of questions with passages of their own, which are mostly measured in such a layout, and of the others."""
_JOINED = 2000
"""Characters. Passages of a chunk are joined to at least so many where a chunk has several."""


class RealText:
    """Makes text of real questions.

    Args:
        questions: questions with passages of their own.
        passages: passages with questions of their own.
        aloud: whether answers say what a question goes through.
    """

    def __init__(self, questions: Sequence[RealQuestion], passages: Sequence[AskedPassage], aloud: bool = False):
        self._passages, self._aloud = list(passages), aloud
        together: dict[tuple[str, ...], list[RealQuestion]] = {}
        for question in questions:
            together.setdefault(question.passages, []).append(question)
        self._groups = list(together.values())  # those with the same passages

    @property
    def has_questions(self) -> bool:
        """Whether there are questions with passages of their own."""
        return bool(self._groups)

    @property
    def has_passages(self) -> bool:
        """Whether there are passages with questions of their own."""
        return bool(self._passages)

    def with_questions(self, rng: random.Random, tokens: int) -> Context | None:
        """Real questions and their passages in any order: as many questions as the length has room for with all that belongs to them. Where it
        has no room for a single one, this is shortened without losing the passages that have an answer in them. None where these alone are
        too long. Room that is left is filled, every other time, with passages that have nothing to do with the questions.
        """
        room, chosen, asked = tokens / TOKENS_PER_CHARACTER, dict[str, None](), list[RealQuestion]()
        used = 0
        for group in rng.sample(self._groups, len(self._groups)):
            passages = [p for p in group[0].passages if p not in chosen]
            needed = sum(map(len, passages))
            if used + needed > room and not asked:
                return self._shortened(rng, rng.choice(group), room)
            if used + needed > room or len(asked) >= _TURNS:
                break
            chosen.update(dict.fromkeys(passages))
            asked += rng.sample(group, len(group))
            used += needed
        filled = rng.random() < 0.5
        answers = [answer.casefold() for question in asked for answer in question.answers]
        while self._passages and filled and used < room:
            text = rng.choice(self._passages).text
            used += len(text)
            if used <= room and not any(answer in text.casefold() for answer in answers):
                chosen[text] = None
        texts = rng.sample(list(chosen), len(chosen))
        turns = [self._turn(question) for question in asked]
        rng.shuffle(turns)
        return Context(rng.choice(PREFIXES), _laid_out(rng, texts, _QUESTIONS_CHANGED), tuple(turns[:_TURNS]))

    def with_passages(self, rng: random.Random, tokens: int) -> Context:
        """Passages in any order, and questions on some of them. There is one at least, however long it is. Every other time those of one
        article come first, so that a question stands among passages that are much like its own.
        """
        room, chosen, used = tokens / TOKENS_PER_CHARACTER, list[AskedPassage](), 0
        order = rng.sample(self._passages, len(self._passages))
        if rng.random() < 0.5:
            article = order[0].article
            order.sort(key=lambda passage: passage.article != article)
        for passage in order:
            if chosen and used + len(passage.text) > room:
                break
            chosen.append(passage)
            used += len(passage.text)
        each = rng.randint(1, 3)
        asked = [Turn(*pair) for p in chosen[:_TURNS] for pair in rng.sample(p.asked, min(each, len(p.asked)))]
        rng.shuffle(asked)
        rng.shuffle(chosen)
        return Context(
            rng.choice(PREFIXES), _laid_out(rng, [p.text for p in chosen], _PASSAGES_CHANGED), tuple(asked[:_TURNS])
        )

    def _shortened(self, rng: random.Random, asked: RealQuestion, room: float) -> Context | None:
        """A question with those of its passages that have what is told in them, and as many others as there is room for."""
        chosen = list(asked.needed if self._aloud else asked.answering)
        used = sum(map(len, chosen))
        if used > room:
            return None
        for passage in rng.sample(asked.passages, len(asked.passages)):
            if passage not in chosen and used + len(passage) <= room:
                chosen.append(passage)
                used += len(passage)
        rng.shuffle(chosen)
        return Context(rng.choice(PREFIXES), _laid_out(rng, chosen, _QUESTIONS_CHANGED), (self._turn(asked),))

    def _turn(self, question: RealQuestion) -> Turn:
        return Turn(question.question, spoken(question.steps, question.answers[0], self._aloud))


def _laid_out(rng: random.Random, passages: Sequence[str], changed: float) -> tuple[str, ...]:
    """Passages as chunks: as they are, or, in a share `changed` of the prompts, as some sets of questions have them: without capitals and accents, with blanks
    around marks, and mostly with several short passages in one chunk.
    """
    if rng.random() >= changed:
        return tuple(passages)
    joined = rng.random() < 0.7
    chunks: list[str] = []
    for passage in map(_plain, passages):
        if joined and chunks and len(chunks[-1]) < _JOINED:
            chunks[-1] += " " + passage
        else:
            chunks.append(passage)
    return tuple(chunks)


def _plain(text: str) -> str:
    """A text in lower case, without accents, with spaces around brackets, quotes and dashes."""
    letters = (c for c in unicodedata.normalize("NFD", text.lower()) if not unicodedata.combining(c))
    return " ".join(re.sub(r'([()\[\]"“”–—-])', r" \1 ", "".join(letters)).split())
