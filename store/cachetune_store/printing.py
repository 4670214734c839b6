"""How a caller's value is shown in an error message.

The value may be anything, so Python's `repr` isn't enough. It raises for an int of 5,000 digits, for lists nested too deep, and whenever
an object's own `__repr__` raises. Its result may have 100 MB, or contain characters that control a terminal.
"""

from __future__ import annotations

import math
import re
import reprlib
from itertools import islice

__all__ = ["plural", "shown", "without_password"]

_MOST = 160
_BITS = 128
"""Bits of the longest int whose digits are shown."""
_ITEMS, _LEVELS = 10, 3
"""How many items of a list are shown, and how many lists inside of one another: what is looked at stays little."""


_URL = re.compile(r"([a-z][a-z0-9+.-]*://)(.*@)?(.*)", re.IGNORECASE | re.DOTALL)
_OF_SERVERS = re.compile(r"(?:valkey|redis)s?://", re.IGNORECASE)


def plural(word: str, count: int) -> str:
    """An English word as it stands behind that number: "chunk" behind 1, "chunks" behind all others."""
    return word if count == 1 else f"{word}s"


def without_password(url: str) -> str:
    """A URL as it may be shown: without user and password, and for a server without what stands behind a ? or #. Other texts stay.

    Give it the URL itself, before anything is cut off or quoted.
    """
    if (match := _URL.fullmatch(url)) is None:
        return url
    scheme, before, rest = match.groups()
    if _OF_SERVERS.fullmatch(scheme):
        return scheme + re.split("[?#]", rest)[0]
    # In the name of a bucket's object, an @ may be no end of a password. One can't know.
    return f"{scheme}...@{rest}" if before else url


def shown(value: object, most: int = _MOST) -> str:
    """`value` as Python would write it, on one line of at most `most` characters. Control characters are escaped. Never raises."""
    try:
        text = _Short(most).repr(value)
    except Exception:
        text = _nameless(value)
    # Unpaired surrogates are no text that a log or a terminal could write; other such characters would be taken for commands.
    plain = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[: most + 1])
    return plain if len(plain) <= most else f"{plain[: most - 3]}..."


class _Short(reprlib.Repr):
    """Python's own way to write a value in short; no more of it is looked at than is shown."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most
        self.maxlevel = _LEVELS
        self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = self.maxdeque = self.maxarray = _ITEMS

    def repr_str(self, x: str, level: int) -> str:
        """The beginning of a string, by which a reader recognises it. reprlib would cut out the middle instead."""
        return repr(x[: self._most])

    def repr_bytes(self, x: bytes | bytearray, level: int) -> str:
        """The beginning, as for a string."""
        return repr(x[: self._most])

    repr_bytearray = repr_bytes

    def repr_int(self, x: int, level: int) -> str:
        """The digits of an int, or how many there are if Python might refuse to write them."""
        if x.bit_length() <= _BITS:
            return repr(x)
        return f"<an int of about {math.ceil(x.bit_length() * math.log10(2))} digits>"

    def repr_dict(self, x: dict[object, object], level: int) -> str:
        """The first items of a dict, in its own order. reprlib would sort them."""
        if level <= 0:
            return "{...}"
        first = islice(x.items(), _ITEMS)
        pieces = [f"{self.repr1(key, level - 1)}: {self.repr1(item, level - 1)}" for key, item in first]
        return f"{{{', '.join(pieces + ['...'] * (len(x) > _ITEMS))}}}"

    def repr_instance(self, x: object, level: int) -> str:
        """An object's own `repr`, unless it raises."""
        if isinstance(x, str) and type(x).__repr__ is str.__repr__:
            return repr(str.__getitem__(x, slice(self._most)))
        if isinstance(x, int) and type(x).__repr__ is int.__repr__:
            return self.repr_int(int.__index__(x), level)
        try:
            return " ".join(repr(x).split())
        except Exception:
            return _nameless(x)


def _nameless(value: object) -> str:
    return f"<{type(value).__name__} object, which can't be shown>"
