"""Invented names and values for training text. None of them can stand in the benchmark of tasks."""

from __future__ import annotations

import random
from collections.abc import Set

GIVEN = (
    "Amara", "Beatrice", "Diego", "Felix", "Gustav", "Henrik", "Ines", "Leila", "Noor", "Odile", "Pavel", "Ruth", "Samira", "Tomas",
    "Viktor", "Yuki",
)  # fmt: skip
ITEMS = (
    "anchor", "apron", "barrel", "brush", "button", "carpet", "compass", "cup", "drum", "fiddle", "flute", "globe", "lantern", "ladder",
    "mirror", "napkin", "oven", "parcel", "quilt", "ribbon", "scarf", "shovel", "spoon", "teapot", "tent", "trumpet", "umbrella", "vase",
    "violin", "whistle",
)  # fmt: skip
JOBS = (
    "astronomer", "botanist", "clockmaker", "diplomat", "editor", "geologist", "interpreter", "joiner", "lawyer", "mason", "nurse",
    "pilot", "sculptor", "surgeon", "translator", "veterinarian",
)  # fmt: skip
COLOURS = (
    "amber",
    "black",
    "blue",
    "brown",
    "crimson",
    "green",
    "grey",
    "orange",
    "purple",
    "red",
    "violet",
    "white",
    "yellow",
)
_ONSETS = (
    "b", "br", "ch", "d", "dr", "f", "g", "gl", "h", "j", "k", "kr", "l", "m", "n", "p", "pr", "r", "s", "sh", "sk", "st", "t", "tr", "v",
    "w", "z", "",
)  # fmt: skip
_VOWELS = ("a", "e", "i", "o", "u", "ai", "ea", "oo", "y")
_CODAS = ("", "", "", "l", "m", "n", "nd", "r", "rk", "s", "sk", "st", "t", "x", "th")
_ENDINGS = (
    "",
    "",
    "ia",
    "ov",
    "et",
    "um",
    "ik",
    "ova",
    "heim",
    "grad",
    "ville",
    "stad",
    "mont",
    "brook",
    "ridge",
    "port",
    "au",
    "os",
)


class Vocabulary:
    """Gives names and values, each once.

    Args:
        rng: what they are drawn with.
        avoid: words that no name is, in lower case.
    """

    def __init__(self, rng: random.Random, avoid: Set[str] = frozenset()):
        self._rng, self._used = rng, set(avoid)

    def name(self) -> str:
        """A new name of one word."""
        while True:
            made = "".join(self._syllable() for _ in range(self._rng.choice((1, 2, 2, 3)))) + self._rng.choice(_ENDINGS)
            if 4 <= len(made) <= 11 and self._new(made.capitalize()):
                return made.capitalize()

    def like(self, name: str) -> str:
        """A new name that begins as another one."""
        while True:
            made = name[: max(2, len(name) - self._rng.choice((1, 2, 3)))] + self._syllable()
            if self._new(made):
                return made

    def person(self) -> str:
        """A new name of two words."""
        return f"{self._rng.choice(GIVEN)} {self.name()}"

    def number(self) -> str:
        """A new number of two to seven digits."""
        while True:
            digits = self._rng.choice((2, 3, 4, 4, 5, 5, 5, 6, 7))
            made = str(self._rng.randrange(10 ** (digits - 1), 10**digits))
            if self._new(made):
                return made

    def year(self) -> str:
        """A year, which may be given again."""
        return str(self._rng.randrange(1740, 2020))

    def value(self, sort: str) -> str:
        """A new value of a sort: number, code, item or name."""
        if sort == "number":
            return self.number()
        if sort == "name":
            return self.name()
        while True:
            made = (
                f"{self._rng.choice('BCDFGHKLMPRTVX')}{self._rng.choice('AEIOU')}-{self._rng.randrange(10, 1000)}"
                if sort == "code"
                else self._rng.choice(ITEMS)
            )
            if self._new(made):
                return made

    def _syllable(self) -> str:
        return self._rng.choice(_ONSETS) + self._rng.choice(_VOWELS) + self._rng.choice(_CODAS)

    def _new(self, made: str) -> bool:
        if made.casefold() in self._used:
            return False
        self._used.add(made.casefold())
        return True
