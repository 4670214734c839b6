"""Questions, the facts that answer them, and the rule by which an answer is right."""

from __future__ import annotations

import re
from dataclasses import dataclass

_NUMBER = 4
"""Digits from which on a number in an answer counts as one that the question asks for, whether or not it stands in the prompt."""


@dataclass(frozen=True)
class Fact:
    """A sentence that is planted in the prose.

    Attributes:
        subject: its first part, which says what it is about.
        rest: its second part, which says what is asked for. Where a fact is split, it is split between both.
        needed: whether the question needs it. The others are there to be told apart from it.
    """

    subject: str
    rest: str
    needed: bool = True

    @property
    def text(self) -> str:
        """The whole sentence."""
        return f"{self.subject} {self.rest}"


@dataclass(frozen=True)
class Rule:
    """When an answer is right: the first different values in it are those that are wanted, as many as are wanted.

    So it doesn't matter in which words they are said, nor what a model adds once it has answered; a wrong value before the right one counts,
    and so does one that is missing.

    Attributes:
        wanted: the values, numbers or words.
        values: all values of the same sort that the prompt's facts have, the wanted ones among them.
        ordered: whether the values have to stand in the order of `wanted`.
    """

    wanted: tuple[str, ...]
    values: frozenset[str]
    ordered: bool = False

    def right(self, answer: str) -> bool:
        """Whether an answer is right."""
        said = self._said(answer)[: len(self.wanted)]
        wanted = [value.casefold() for value in self.wanted]
        return said == wanted if self.ordered else sorted(said) == sorted(wanted)

    def _said(self, answer: str) -> list[str]:
        """The different values in an answer, in order."""
        plain = re.sub(r"(?<=\d),(?=\d{3}\b)", "", answer.casefold())  # 48,213 is 48213
        values = {value.casefold() for value in self.values}
        numbers = all(value.isdigit() for value in values)
        words = re.findall(r"\w+", plain)
        odd = (w for w in words if w in values or (numbers and w.isdigit() and len(w) >= _NUMBER))
        return list(dict.fromkeys(odd))


@dataclass(frozen=True)
class Question:
    """What is asked, and what is planted for it.

    Attributes:
        query: the question as the prompt has it.
        facts: all facts, needed ones and others.
        rule: when an answer is right.
        answer_tokens: the most tokens that an answer has.
    """

    query: str
    facts: tuple[Fact, ...]
    rule: Rule
    answer_tokens: int = 24
