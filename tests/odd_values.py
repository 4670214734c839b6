"""Invalid values for any argument, and what functions do with them."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cachetune_rag import CacheTuneError, StoreError
from cachetune_store.printing import shown


class Awkward:
    """An object that is valid for no argument."""

    def __repr__(self) -> str:
        return "<awkward>"


def _generator() -> Iterator[object]:
    yield None


def nested(depth: int) -> list[Any]:
    """A list in a list in a list."""
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def odd_values() -> list[Any]:
    """Made anew each time: some of them can be used only once."""
    return [
        None, True, 0, -1, 3, 2**64, 10**30, 10**400, 0.5, math.nan, math.inf, -math.inf, 1e308, 1j,
        "", "x", "auto", "\ud800", "a\0b", b"", b"b", bytearray(b"b"),
        [], ["a"], [None], [3], [b"b"], ["\ud800"], [[]], (), {}, {"a": 1}, {3: None}, set(), {"a"}, range(2),
        _generator(), object(), Awkward(), Awkward, lambda *args, **named: None, len, Path("x"),
    ]  # fmt: skip


class Mute:
    """An object that can't even be shown."""

    def __repr__(self) -> str:
        raise RuntimeError("no")


class Talkative:
    """An object that has much to say, some of it to the terminal."""

    def __repr__(self) -> str:
        return "\x1b[2J talk" * 300_000


class Word(str):
    """A string of another class."""

    __slots__ = ()


class Count(int):
    """An int of another class."""


def hard_values() -> list[Any]:
    """Values that are hard to put into a message, or nearly what is asked for."""
    text = "long" * 1000
    return [
        nested(5000), 10**5000, -(10**5000), [10**5000], text, text.encode(), [text], Word(text), Word("x"), Count(3), Count(10**5000),
        Mute(), [Mute()], Talkative(), "\ud800\udc00", np.int64(3), np.float32(0.5), np.bool_(True), np.str_("x"), np.array(3),
        math.nan, [math.nan],
    ]  # fmt: skip


def foreign(call: Callable[[Any], Any], values: list[Any] | None = None) -> list[str]:
    """The errors of `call` for odd values that are not errors of this project, a line for each."""
    found = []
    for value in odd_values() if values is None else values:
        name = shown(value, 40)
        try:
            call(value)
        except (CacheTuneError, StoreError) as error:
            if len(str(error)) > 2000 or not str(error).replace("\n", "").isprintable():
                found.append(f"{name}: {type(error).__name__} of {len(str(error))} characters: {shown(str(error), 80)}")
            if not str(error):
                found.append(f"{name}: {type(error).__name__} without a word")
        except Exception as error:
            at = traceback.extract_tb(error.__traceback__)[-1]
            found.append(f"{name}: {type(error).__name__}: {error!s:.120} ({Path(at.filename).name}:{at.lineno})")
    return found


def accepted(call: Callable[[Any], Any], values: list[Any]) -> list[str]:
    """The values that are accepted without an error."""
    found = []
    for value in values:
        try:
            call(value)
        except (CacheTuneError, StoreError):
            continue
        found.append(shown(value, 60))
    return found
