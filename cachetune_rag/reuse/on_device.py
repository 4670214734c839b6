"""The model's device while a prompt is read: made the current one, waited for, and time taken of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

MEANWHILE = 0.0005
"""Seconds between two calls of what is done while the device computes, or while a turn to compute is waited for: less than the device needs to copy a layer of a long prompt."""


def current(device: torch.device) -> AbstractContextManager[object]:
    """Within it, the model's GPU is the current one: kernels and streams go by that."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def wait(
    device: torch.device, meanwhile: Callable[[], None] | None = None, end: torch.cuda.Event | None = None
) -> None:
    """Wait until the current stream has done what is queued: not the whole device, on which others may compute.

    Args:
        device: the model's; there is nothing to wait for on a CPU.
        meanwhile: called about every `MEANWHILE` seconds.
        end: was recorded behind what has to be waited for; others may have queued more on the stream since then. None: all that is queued.
    """
    if device.type != "cuda":
        return
    done = torch.cuda.current_stream(device).record_event() if end is None else end
    while meanwhile is not None and not done.query():
        meanwhile()
        time.sleep(MEANWHILE)
    done.synchronize()


class Clock:
    """Seconds from one lap to the next."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap, or since the clock was made."""
        now = time.perf_counter()
        took, self._last = now - self._last, now
        return took

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """While the context is open, the lap doesn't grow."""
        before = time.perf_counter()
        try:
            yield
        finally:
            self._last += time.perf_counter() - before
