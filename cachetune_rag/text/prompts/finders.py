"""What is found in a prompt's token ids by what they spell."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from cachetune_rag.text.prompts.continuations import Continuations, FindContinuations, no_continuations
from cachetune_rag.text.prompts.last_turn import FindLastTurn, LastTurns, no_turn
from cachetune_rag.text.prompts.sentences import FindSentences, Sentences, no_sentences
from cachetune_rag.text.prompts.shape import FindShape, Shapes, no_shape


@dataclass(frozen=True)
class Finders:
    """Each finds one thing in a prompt. Without them, nothing is found: for prompts of token ids that spell no text.

    Attributes:
        continuations: the sentences that go on from one chunk to the next.
        sentences: all sentences of the chunks.
        shapes: what kind of text the chunks are.
        last_turn: where the last turn begins.
    """

    continuations: FindContinuations = no_continuations
    sentences: FindSentences = no_sentences
    shapes: FindShape = no_shape
    last_turn: FindLastTurn = no_turn


NO_FINDERS = Finders()


def finders_for(tokenizer: Any, control: Collection[int]) -> Finders:
    """Those for a tokenizer, which nothing may change, and the ids of its control tokens."""
    return Finders(Continuations(tokenizer), Sentences(tokenizer), Shapes(tokenizer), LastTurns(control))
