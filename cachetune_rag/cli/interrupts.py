"""Ctrl-C where it must end the process at once. This module imports nothing heavy, because it is needed before everything else."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

INTERRUPTED = 130


@contextmanager
def instant_interrupt() -> Iterator[None]:
    """While the context is open, Ctrl-C ends the process at once. It is for work that leaves nothing to be saved.

    During the import of torch and transformers, a KeyboardInterrupt may become another error, or be lost.
    """
    before = end_at_once()
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGINT, before)


def end_at_once() -> Any:
    """From now on, Ctrl-C ends the process at once. Where it has no effect (a shell's background jobs ignore it), it gets none.

    Returns:
        The handler that was there before; None if nothing was changed.
    """
    before = signal.getsignal(signal.SIGINT)
    if before in (None, signal.SIG_IGN) or threading.current_thread() is not threading.main_thread():
        return None
    signal.signal(signal.SIGINT, _leave)
    return before


def _leave(*_: object) -> None:
    os.write(2, b"\nInterrupted.\n")
    os._exit(INTERRUPTED)
