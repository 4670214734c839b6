"""Checks of the arguments of a store's public methods."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .errors import StoreArgumentError
from .keys import ChunkKey
from .printing import shown

__all__ = ["check_flag", "check_items", "check_key", "check_keys", "check_kind", "check_tensor", "check_text"]


def check_kind(value: Any, kind: type | tuple[type, ...], what: str, use: str) -> None:
    """Refuse a value that isn't an instance of `kind`.

    Args:
        value: what was given.
        kind: what it must be an instance of.
        what: what it was given as, for the message.
        use: what to give instead, for the message.

    Raises:
        StoreArgumentError: says so.
    """
    if not isinstance(value, kind):
        raise StoreArgumentError(f"{what} is {shown(value)}, a {type(value).__name__}; {use}")


def check_text(value: Any, what: str) -> None:
    """Refuse a value that isn't a string.

    Raises:
        StoreArgumentError: says so.
    """
    check_kind(value, str, what, "use a string")


def check_flag(value: Any, what: str) -> None:
    """Refuse a value that is neither True nor False. Any text would count as True, even "no" and "false".

    Raises:
        StoreArgumentError: says so.
    """
    check_kind(value, bool, what, "use True or False")


def check_key(key: Any) -> None:
    """Refuse a value that isn't a chunk key.

    Raises:
        StoreArgumentError: says so.
    """
    check_kind(key, ChunkKey, "chunk key", "build keys with make_key()")


def check_keys(keys: Any) -> list[ChunkKey]:
    """Return chunk keys as a list. An iterator is consumed.

    Raises:
        StoreArgumentError: a value isn't a chunk key.
    """
    found: list[ChunkKey] = check_items(keys, "chunk keys", "use a list of them")
    for key in found:
        check_key(key)
    return found


def check_items(values: Any, what: str, use: str) -> list[Any]:
    """Return the items of an iterable as a list; arguments as for `check_kind`.

    Raises:
        StoreArgumentError: it isn't iterable, or is text or bytes.
    """
    try:
        items = None if isinstance(values, str | bytes | bytearray) else iter(values)
    except TypeError:  # NumPy's arrays of no dimension have __iter__ and still can't be iterated over
        items = None
    if items is None:
        raise StoreArgumentError(f"{what} are {shown(values)}, a {type(values).__name__}; {use}")
    return list(items)


def check_tensor(value: Any, what: str) -> None:
    """Refuse a value that isn't a dense tensor of real numbers in memory.

    Raises:
        StoreArgumentError: says so.
    """
    check_kind(value, Tensor, what, "use a torch.Tensor")
    if value.is_meta or value.layout is not torch.strided or value.is_complex() or value.is_quantized:
        raise StoreArgumentError(
            f"{what} is a {value.layout} tensor of {value.dtype} on {value.device}; use a dense one of real numbers that is in memory"
        )
