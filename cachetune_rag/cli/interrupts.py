"""Ctrl-C and SIGTERM (`kill`, `timeout`, service managers): a line on stderr, the shell's usual exit status, and a store that is whole.

This module imports nothing heavy, because it is needed before everything else.
"""

from __future__ import annotations

import atexit
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

_ENDS = {signal.SIGINT: "Interrupted", signal.SIGTERM: "Terminated"}


class Terminated(KeyboardInterrupt):
    """SIGTERM. It ends a command as Ctrl-C does."""


def line_for(error: KeyboardInterrupt) -> str:
    """What is said of a command that was ended so: "Interrupted" or "Terminated"."""
    return _ENDS[_signal_of(error)]


def status_for(error: KeyboardInterrupt) -> int:
    """The exit status of a command that was ended so: 130 or 143."""
    return 128 + _signal_of(error)


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """While the context is open, SIGTERM raises `Terminated`, so that a command closes the store as it does after Ctrl-C."""
    before = _set(signal.SIGTERM, _raise_terminated)
    try:
        yield
    finally:
        _restore({signal.SIGTERM: before})


@contextmanager
def instant_interrupt() -> Iterator[None]:
    """While the context is open, Ctrl-C and SIGTERM end the process at once. It is for work that leaves nothing to be saved.

    During the import of torch and transformers, a KeyboardInterrupt may become another error, or be lost.
    """
    before = end_at_once()
    try:
        yield
    finally:
        _restore(before)


def end_at_once() -> Mapping[signal.Signals, Any]:
    """From now on, Ctrl-C and SIGTERM end the process at once. Where one has no effect (a shell's background jobs ignore Ctrl-C), it gets none.

    Returns:
        The handlers that were there before; None for a signal that stays as it is.
    """
    _ignored_last()
    return {number: _set(number, _leave) for number in _ENDS}


def _signal_of(error: KeyboardInterrupt) -> signal.Signals:
    return signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT


def _set(number: signal.Signals, handler: Callable[..., None]) -> Any:
    before = signal.getsignal(number)
    if before in (None, signal.SIG_IGN) or threading.current_thread() is not threading.main_thread():
        return None
    signal.signal(number, handler)
    return before


def _restore(before: Mapping[signal.Signals, Any]) -> None:
    for number, handler in before.items():
        if handler is not None:
            signal.signal(number, handler)


@cache
def _ignored_last() -> None:
    # At its very end, Python sets all handlers back to the system's, by which a process dies without a line, though its work is done.
    # Registered before the heavy imports, so that it is called after all that they have registered.
    atexit.register(lambda: [signal.signal(number, signal.SIG_IGN) for number in _ENDS])


def _raise_terminated(*_: object) -> None:
    raise Terminated


def _leave(number: int, *_: object) -> None:
    os.write(2, f"\n{_ENDS[signal.Signals(number)]}.\n".encode())
    os._exit(128 + number)
