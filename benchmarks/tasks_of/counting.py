"""The word that is named most often over many chunks (RULER's common words, Hsieh et al. 2024, section 3)."""

from __future__ import annotations

import random

from .names import Names
from .questions import Fact, Question, Rule

WORDS = (
    ("basket", "casket"),
    ("bottle", "battle"),
    ("candle", "handle"),
    ("feather", "leather"),
    ("hammer", "hamper"),
    ("kettle", "nettle"),
    ("marble", "warble"),
    ("needle", "noodle"),
    ("pillow", "willow"),
    ("rocket", "pocket"),
    ("saddle", "paddle"),
    ("wagon", "dragon"),
)
"""Words, and what each is nearly."""
_TIMES, _NEAR_TIMES, _OTHERS = 4, 2, 2


def common_word(rng: random.Random, names: Names, misleading: bool) -> Question:
    """One word is named four times, two others once each; as near-duplicates, a word that is nearly the same is named twice."""
    (word, near), *others = rng.sample(WORDS, 1 + _OTHERS)
    named = [word] * _TIMES + [near] * _NEAR_TIMES * misleading + [other for other, _ in others]
    facts = tuple(Fact("The word of this passage is", f"{one}.", one == word) for one in named)
    query = "Which word is the word of the most passages?"
    return Question(query, facts, Rule((word,), frozenset(named)))
