"""What callers hand to a store, checked where it comes in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .errors import StoreArgumentError
from .keys import ChunkKey
from .printing import shown

__all__ = ["check_flag", "check_items", "check_key", "check_keys", "check_kind", "check_tensor", "check_text"]


def check_kind(value: Any, kind: type | tuple[type, ...], what: str, use: str) -> None:
    """Refuse what is no `kind`.

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
    """Refuse what is no string.

    Raises:
        StoreArgumentError: says so.
    """
    check_kind(value, str, what, "use a string")


def check_flag(value: Any, what: str) -> None:
    """Refuse what is neither True nor False: any text would count as True, "no" and "false" too.

    Raises:
        StoreArgumentError: says so.
    """
    check_kind(value, bool, what, "use True or False")


def check_key(key: Any) -> None:
    """Refuse what is no chunk key.

    Raises:
        StoreArgumentError: says so.
    """
    check_kind(key, ChunkKey, "chunk key", "build keys with make_key()")


def check_keys(keys: Any) -> list[ChunkKey]:
    """Chunk keys as a list; what can be gone through only once is gone through here.

    Raises:
        StoreArgumentError: they are none.
    """
    found: list[ChunkKey] = check_items(keys, "chunk keys", "use a list of them")
    for key in found:
        check_key(key)
    return found


def check_items(values: Any, what: str, use: str) -> list[Any]:
    """What can be gone through, as a list; arguments as for `check_kind`.

    Raises:
        StoreArgumentError: it can't, or is text.
    """
    try:
        items = None if isinstance(values, str | bytes | bytearray) else iter(values)
    except TypeError:  # it may look as if it could
        items = None
    if items is None:
        raise StoreArgumentError(f"{what} are {shown(values)}, a {type(values).__name__}; {use}")
    return list(items)


def check_tensor(value: Any, what: str) -> None:
    """Refuse what is no tensor of plain numbers that are somewhere to be read.

    Raises:
        StoreArgumentError: says so.
    """
    check_kind(value, Tensor, what, "use a torch.Tensor")
    if value.is_meta or value.layout is not torch.strided or value.is_complex() or value.is_quantized:
        raise StoreArgumentError(
            f"{what} is a {value.layout} tensor of {value.dtype} on {value.device}; use a dense one of real numbers that is in memory"
        )
