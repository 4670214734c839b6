"""Questions in other words than the text has, among people of whom the same is told (RULER's question answering with distractors)."""

from __future__ import annotations

import random

from .names import Names
from .questions import Fact, Question, Rule

GIVEN = (
    ("Anna", "Hanna"),
    ("Clara", "Carla"),
    ("Emil", "Emily"),
    ("Jonas", "Jona"),
    ("Marta", "Maria"),
    ("Oskar", "Oswin"),
)
"""Given names, and what each is nearly."""
TRADES = (
    "baker",
    "carpenter",
    "cooper",
    "dyer",
    "farrier",
    "glazier",
    "miller",
    "potter",
    "saddler",
    "tailor",
    "weaver",
)
_OTHERS = 3


def people(rng: random.Random, names: Names, misleading: bool) -> Question:
    """Where somebody was born, or what somebody's trade was. Near-duplicates are a namesake and somebody whose name is like it."""
    (given, near), *others = rng.sample(GIVEN, 1 + _OTHERS)
    family = names.name()
    people = [f"{given} {family}", *(f"{other} {names.name()}" for other, _ in others)]
    if misleading:
        people += [f"{near} {family}", f"{given} {names.like(family)}"]
    towns = [names.name() for _ in people]
    trades = rng.sample(TRADES, len(people))
    facts = tuple(
        Fact(
            f"In the old register, {person}",
            f"is said to have been born in {town} and to have worked as a {trade}.",
            not i,
        )
        for i, (person, town, trade) in enumerate(zip(people, towns, trades, strict=True))
    )
    if rng.random() < 0.5:
        return Question(f"Which town did {people[0]} come from?", facts, Rule((towns[0],), frozenset(towns)))
    return Question(f"What was the profession of {people[0]}?", facts, Rule((trades[0],), frozenset(trades)))
