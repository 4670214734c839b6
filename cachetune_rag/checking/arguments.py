"""What several public methods take, checked where it comes in: flags, callbacks, and seconds to wait."""

from __future__ import annotations

import threading
from typing import Any

from cachetune_rag.errors import ConfigError
from cachetune_store.printing import shown


def check_flag(value: Any, name: str) -> None:
    """Refuse what is neither True nor False: any text would count as True, "no" and "false" too.

    Raises:
        ConfigError: says so.
    """
    if not isinstance(value, bool):
        raise ConfigError(f"{name} is {shown(value)}: use True or False.")


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
    fits = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    if not fits or not 0 <= seconds <= threading.TIMEOUT_MAX:
        raise ConfigError(f"{name} is {shown(seconds)}: use seconds, from 0 upwards, or None to wait until it is done.")


def is_iterable(value: Any) -> bool:
    """Whether it can be gone through; NumPy's arrays of no dimension only look as if they could."""
    try:
        iter(value)
    except TypeError:
        return False
    return True
