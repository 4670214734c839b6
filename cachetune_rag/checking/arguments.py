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
    """Refuse a value that is neither True nor False. Any text would count as True, even "no" and "false".

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
    """Refuse a value that is not a number from 0 to 1.

    Args:
        value: the given value.
        name: the argument's name.
        use: what to use instead, for the message.

    Raises:
        ConfigError: says so.
    """
    if not is_number(value, 0, 1):
        raise ConfigError(f"{name} is {shown(value)}: use {use}.")


def check_count(value: Any, name: str, use: str, least: int = 1, most: float = math.inf) -> None:
    """Refuse a value that is not an int from `least` to `most`.

    Args:
        value, name, use: as for `check_share`.
        least, most: the smallest and the largest allowed value.

    Raises:
        ConfigError: says so.
    """
    if not is_count(value, least, most):
        raise ConfigError(f"{name} is {shown(value)}: use {use}.")


def check_tenant(tenant: object) -> None:
    """Refuse a tenant's name that is not a string, or not valid Unicode.

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
    """Refuse a value that is not None and can't be called.

    Raises:
        ConfigError: says so.
    """
    if value is not None and not callable(value):
        raise ConfigError(f"{name} is {shown(value)}, which can't be called: use a function of one argument, or None.")


def check_wait(seconds: Any, name: str = "timeout") -> None:
    """Refuse a time that nobody can wait.

    Raises:
        ConfigError: it is neither None nor a number of seconds of at least 0.
    """
    if seconds is None:
        return
    if not is_number(seconds, 0, threading.TIMEOUT_MAX):
        raise ConfigError(f"{name} is {shown(seconds)}: use seconds, from 0 upwards, or None to wait until it is done.")


def is_iterable(value: Any) -> bool:
    """Whether `iter` accepts the value. NumPy's arrays without dimensions have `__iter__`, but `iter` refuses them."""
    try:
        iter(value)
    except TypeError:
        return False
    return True


def hint(name: str, known: Iterable[str], otherwise: str, cutoff: float = 0.6) -> str:
    """A question that names the most similar known name; `otherwise` if none is similar.

    Args:
        name: the given name.
        known: all known names.
        otherwise: the text if no name is similar.
        cutoff: how similar two names have to be, from 0 to 1, as for `difflib.get_close_matches`.
    """
    near = difflib.get_close_matches(name, sorted(known), 1, cutoff)
    return f"did you mean {shown(near[0])}?" if near else otherwise
