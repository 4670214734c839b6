"""A value that is followed through several facts (RULER's variable tracking, Hsieh et al. 2024, section 3)."""

from __future__ import annotations

import random
from itertools import pairwise

from .names import Names
from .questions import Fact, Question, Rule


def tracking(hops: int, rng: random.Random, names: Names, misleading: bool) -> Question:
    """A chain of `hops` facts. The first has the number, each other one says that its own is that of the one before; asked for is the last.

    There is always a chain of two facts beside it. Near-duplicates are a chain of two whose last name is like the one that is asked for.
    """
    numbers: list[str] = []

    def chain(links: list[str], needed: bool) -> list[Fact]:
        numbers.append(names.number())
        facts = [Fact(f"The safe of {links[0]} opens with", f"the number {numbers[-1]}.", needed)]
        for before, name in pairwise(links):
            facts.append(Fact(f"The safe of {name} opens with the same number as", f"the safe of {before}.", needed))
        return facts

    links = [names.name() for _ in range(hops)]
    facts = chain(links, True)
    facts += chain([names.name(), names.name()], False)
    if misleading:
        facts += chain([names.like(links[0]), names.like(links[-1])], False)
    query = f"With which number does the safe of {links[-1]} open?"
    return Question(query, tuple(facts), Rule((numbers[0],), frozenset(numbers)))
