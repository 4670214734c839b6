"""A piece of training text: passages, and what is asked about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

TOKENS_PER_CHARACTER = 0.26
"""About how many tokens a character of such text has. Real counts decide in the end; a context only has to be about as long as asked for."""


STEP = "; "
"""Stands behind each step of an answer that is told aloud."""


@dataclass(frozen=True)
class Turn:
    """A question and its answer."""

    question: str
    answer: str


def spoken(steps: Sequence[str], answer: str, aloud: bool) -> str:
    """An answer as it is learned: it alone, or behind what the question goes through."""
    return STEP.join([*steps, answer]) if aloud else answer


@dataclass(frozen=True)
class Context:
    """Passages, and what is asked about them.

    Attributes:
        prefix: text before the passages.
        chunks: the passages.
        turns: questions and answers, one after the other.
    """

    prefix: str
    chunks: tuple[str, ...]
    turns: tuple[Turn, ...]
