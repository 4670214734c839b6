"""Checks of what several public methods take: flags, numbers, callbacks, and names that may be misspelt."""

from __future__ import annotations

import difflib
import math
import threading
from collections.abc import Iterable
from typing import Any, TypeGuard

from cachetune_rag.errors import ConfigError
from cachetune_store.printing import shown


def check_flag(value: Any, name: str) -> None:
    """Refuse what is neither True nor False: any text would count as True, "no" and "false" too.

    Raises:
        ConfigError: says so.
    """
    if not isinstance(value, bool):
        raise ConfigError(f"{name} is {shown(value)}: use True or False.")


def is_number(value: Any, least: float = -math.inf, most: float = math.inf) -> TypeGuard[float]:
    """Whether it is an int or a float from `least` to `most`. True and False are no numbers here, and NaN is in no range."""
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most


def is_count(value: Any, least: int = 0, most: float = math.inf) -> TypeGuard[int]:
    """Whether it is an int from `least` to `most`. True and False are no numbers here."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def check_share(value: Any, name: str, use: str = "a number from 0 to 1") -> None:
    """Refuse what is no number from 0 to 1.

    Args:
        value: what was given.
        name: the argument's.
        use: what the message says to use instead.

    Raises:
        ConfigError: says so.
    """
    if not is_number(value, 0, 1):
        raise ConfigError(f"{name} is {shown(value)}: use {use}.")


def check_count(value: Any, name: str, use: str, least: int = 1, most: float = math.inf) -> None:
    """Refuse what is no int from `least` to `most`.

    Args:
        value, name, use: as for `check_share`.
        least, most: what is allowed.

    Raises:
        ConfigError: says so.
    """
    if not is_count(value, least, most):
        raise ConfigError(f"{name} is {shown(value)}: use {use}.")


def check_tenant(tenant: object) -> None:
    """Refuse a tenant's name that is no string, or no valid Unicode.

    Raises:
        ConfigError: says which.
    """
    if not isinstance(tenant, str):
        raise ConfigError(f'tenant is {shown(tenant)}: use a string, "" for the only one there is.')
    try:
        tenant.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"tenant is {shown(tenant)}, which is no valid Unicode: use another name.") from None


def check_callback(value: Any, name: str) -> None:
    """Refuse what can't be called and isn't None.

    Raises:
        ConfigError: says so.
    """
    if value is not None and not callable(value):
        raise ConfigError(f"{name} is {shown(value)}, which can't be called: use a function of one argument, or None.")


def check_wait(seconds: Any, name: str = "timeout") -> None:
    """Refuse what nobody can wait for.

    Raises:
        ConfigError: it is neither None nor a number of seconds of at least 0.
    """
    if seconds is None:
        return
    if not is_number(seconds, 0, threading.TIMEOUT_MAX):
        raise ConfigError(f"{name} is {shown(seconds)}: use seconds, from 0 upwards, or None to wait until it is done.")


def is_iterable(value: Any) -> bool:
    """Whether it can be gone through; NumPy's arrays of no dimension only look as if they could."""
    try:
        iter(value)
    except TypeError:
        return False
    return True


def hint(name: str, known: Iterable[str], otherwise: str, cutoff: float = 0.6) -> str:
    """A question after the nearest known name; `otherwise` where none is near.

    Args:
        name: what was given.
        known: all names that there are.
        otherwise: what to say where it is no typing error.
        cutoff: how alike two names have to be, from 0 to 1, as for `difflib.get_close_matches`.
    """
    near = difflib.get_close_matches(name, sorted(known), 1, cutoff)
    return f"did you mean {shown(near[0])}?" if near else otherwise
