"""What callers hand to a store, checked where it comes in."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .errors import StoreError
from .keys import ChunkKey

__all__ = ["check_key", "check_keys", "check_text"]


def check_text(value: Any, what: str) -> None:
    """Refuse what is no string.

    Raises:
        StoreError: says so.
    """
    if not isinstance(value, str):
        raise StoreError(f"{what} is {value!r:.80}, a {type(value).__name__}; use a string")


def check_key(key: Any) -> None:
    """Refuse what is no chunk key.

    Raises:
        StoreError: says so.
    """
    if not isinstance(key, ChunkKey):
        raise StoreError(f"chunk key {key!r:.80} is a {type(key).__name__}; build keys with make_key()")


def check_keys(keys: Any) -> list[ChunkKey]:
    """Chunk keys as a list; what can be gone through only once is gone through here.

    Raises:
        StoreError: they are none.
    """
    if isinstance(keys, str | bytes) or not isinstance(keys, Iterable):
        raise StoreError(f"chunk keys are {keys!r:.80}, a {type(keys).__name__}; use a list of them")
    found = list(keys)
    for key in found:
        check_key(key)
    return found
