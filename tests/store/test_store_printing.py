"""Any value is shown in messages as Python writes it, but short."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from odd_values import hard_values, odd_values

from cachetune_store.printing import shown, without_password


class Steering:
    def __repr__(self) -> str:
        return "\x1b[2J\ud800\n  two  lines\u202e"


class Named(str):
    __slots__ = ()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("it's", '"it\'s"'),
        (3, "3"),
        (True, "True"),
        (0.5, "0.5"),
        (None, "None"),
        ([1, "a", {"b": (2,)}], "[1, 'a', {'b': (2,)}]"),
        ({"b": 1, "a": 2}, "{'b': 1, 'a': 2}"),
        (list(range(99)), "[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ...]"),
        ([[[[[1]]]]], "[[[[...]]]]"),
        ("\x1b\ud800", "'\\x1b\\ud800'"),
        (Named("x"), "'x'"),
        (np.float64(0.5), "np.float64(0.5)"),
        (10**5000, "<an int of about 5001 digits>"),
        ("x" * 300, f"'{'x' * 156}..."),
        (Steering(), "\\x1b[2J\\ud800 two lines\\u202e"),
    ],
    ids=lambda value: shown(value, 40),
)
def test_a_value_is_shown_in_short(value: Any, text: str) -> None:
    assert shown(value) == text


@pytest.mark.parametrize("most", [20, 160])
def test_nothing_is_too_long_or_raises(most: int) -> None:
    values = [*odd_values(), *hard_values(), Steering()]
    for value in [*values, values, {"a": values}, [[values] * 50] * 50]:
        text = shown(value, most)
        assert 0 < len(text) <= max(most, 60)
        assert text.isprintable()
        text.encode()


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("valkey://user:pass@host:6379/kv", "valkey://host:6379/kv"),
        ("rediss://:p@ss/w@rd@host/kv", "rediss://host/kv"),
        ("valkey://u:it's \"a\nsecret@host", "valkey://host"),
        ("VALKEY://user:" + "x" * 500 + "@host", "VALKEY://host"),
        ("valkey://host/kv?password=secret", "valkey://host/kv"),
        ("https://user:pa/ss@host/a", "https://...@host/a"),
        ("s3://bucket/a", "s3://bucket/a"),
        ("user@host", "user@host"),
    ],
)
def test_users_and_passwords_of_urls_are_not_shown(url: str, text: str) -> None:
    assert without_password(url) == text


def test_it_loads_nothing_heavy() -> None:
    code = "import sys, cachetune_store.printing as p; print(p.shown('x'), {'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "'x' set()\n"
