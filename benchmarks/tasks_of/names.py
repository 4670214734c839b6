"""Invented names and numbers, none of which stands in the prose."""

from __future__ import annotations

import random
from collections.abc import Set
from itertools import product

FIRST = (
    "Bel",
    "Cor",
    "Dal",
    "Fen",
    "Gar",
    "Hol",
    "Kes",
    "Lun",
    "Mar",
    "Nor",
    "Pel",
    "Quil",
    "Ros",
    "Sel",
    "Tor",
    "Vel",
)
SECOND = ("an", "bar", "den", "dor", "fi", "gan", "lin", "mo", "ner", "ra", "sa", "tan", "ve", "wi")
THIRD = ("by", "dale", "field", "ford", "holm", "mere", "more", "ton", "wick", "worth")


def all_names() -> frozenset[str]:
    """Every name that can be given."""
    return frozenset(map("".join, product(FIRST, SECOND, THIRD)))


class Names:
    """Gives names and numbers, each once.

    Args:
        rng: what they are drawn with.
        avoid: words that no name is, in lower case.
    """

    def __init__(self, rng: random.Random, avoid: Set[str] = frozenset()):
        self._rng, self._used = rng, set(avoid)

    def name(self) -> str:
        """A new name of three syllables."""
        while True:
            made = "".join(self._rng.choice(part) for part in (FIRST, SECOND, THIRD))
            if self._new(made):
                return made

    def like(self, name: str) -> str:
        """A new name that has the beginning of another one."""
        stem = next(name[: -len(end)] for end in THIRD if name.endswith(end))
        for end in self._rng.sample(THIRD, len(THIRD)):
            if self._new(stem + end):
                return stem + end
        raise ValueError(f"all names that are like {name} are taken.")

    def number(self) -> str:
        """A new number of five digits."""
        while True:
            made = str(self._rng.randrange(10_000, 100_000))
            if self._new(made):
                return made

    def _new(self, made: str) -> bool:
        if made.casefold() in self._used:
            return False
        self._used.add(made.casefold())
        return True
