"""Needles: one, among several keys, with several values, for several queries (RULER's NIAH tasks, Hsieh et al. 2024, section 3)."""

from __future__ import annotations

import random

from .names import Names
from .questions import Fact, Question, Rule

_THINGS = ("access code", "badge number", "file number", "inventory number", "locker number")
SITES = ("archive", "brewery", "depot", "harbour", "library", "mill", "observatory", "theatre")
_OTHER_KEYS = 3
_VALUES = 3


class _Needles:
    """Facts of one sort: the number of a thing of a place. Each place has a name and a kind of site."""

    def __init__(self, rng: random.Random, names: Names):
        self._rng, self._names = rng, names
        self.thing = rng.choice(_THINGS)
        self.numbers: list[str] = []

    def place(self) -> tuple[str, str]:
        """A new place."""
        return self._names.name(), self._rng.choice(SITES)

    def fact(self, place: tuple[str, str], needed: bool = True, start: str = "The") -> Fact:
        """A fact on a place, with a new number."""
        self.numbers.append(self._names.number())
        name, site = place
        return Fact(f"{start} {self.thing} of the {name} {site}", f"is {self.numbers[-1]}.", needed)

    def near(self, place: tuple[str, str]) -> list[Fact]:
        """Near-duplicates: the same name with another site, and a like name with the same site."""
        name, site = place
        other = self._rng.choice([s for s in SITES if s != site])
        return [self.fact((name, other), needed=False), self.fact((self._names.like(name), site), needed=False)]


def one_needle(rng: random.Random, names: Names, misleading: bool) -> Question:
    """One fact."""
    return _one_of(rng, names, misleading, others=0)


def several_keys(rng: random.Random, names: Names, misleading: bool) -> Question:
    """One fact among others of the same sort."""
    return _one_of(rng, names, misleading, others=_OTHER_KEYS)


def several_values(rng: random.Random, names: Names, misleading: bool) -> Question:
    """Three facts on one key, each with a value. All are asked for."""
    needles = _Needles(rng, names)
    place = needles.place()
    facts = [needles.fact(place, start="One") for _ in range(_VALUES)]
    wanted = tuple(needles.numbers)
    facts += needles.near(place) if misleading else []
    query = f"What are the three {needles.thing}s of the {' '.join(place)}?"
    return Question(query, tuple(facts), Rule(wanted, frozenset(needles.numbers)), answer_tokens=64)


def several_queries(rng: random.Random, names: Names, misleading: bool) -> Question:
    """Two of four facts are asked for at once, in an order that the question names."""
    needles = _Needles(rng, names)
    places = [needles.place(), needles.place()]
    facts = [needles.fact(place) for place in places]
    wanted = tuple(needles.numbers)
    facts += [needles.fact(needles.place(), needed=False) for _ in range(2)]
    if misleading:
        facts += [fact for place in places for fact in needles.near(place)]
    first, second = (" ".join(place) for place in places)
    query = f"What is the {needles.thing} of the {first}, and what is the {needles.thing} of the {second}?"
    return Question(query, tuple(facts), Rule(wanted, frozenset(needles.numbers), ordered=True), answer_tokens=64)


def _one_of(rng: random.Random, names: Names, misleading: bool, others: int) -> Question:
    needles = _Needles(rng, names)
    place = needles.place()
    facts = [needles.fact(place)]
    wanted = tuple(needles.numbers)
    facts += [needles.fact(needles.place(), needed=False) for _ in range(others)]
    facts += needles.near(place) if misleading else []
    query = f"What is the {needles.thing} of the {' '.join(place)}?"
    return Question(query, tuple(facts), Rule(wanted, frozenset(needles.numbers)))
