"""Leaves a remote place alone for a while after it has failed, so that not every request waits for it."""

from __future__ import annotations

import threading
import time

__all__ = ["Breaker"]

_FIRST, _LONGEST = 0.5, 30.0


class Breaker:
    """Says whether the place may be asked. After a failure it may not, for half a second, then a second, and so on up to 30."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pause = _FIRST
        self._until = 0.0
        self.reason = ""

    @property
    def closed(self) -> bool:
        """Whether the place may be asked now."""
        return time.monotonic() >= self._until

    @property
    def wait(self) -> float:
        """Seconds until the place may be asked again."""
        return max(0.0, self._until - time.monotonic())

    def failed(self, reason: str) -> None:
        """The place didn't answer. Failures of requests that were sent before the pause count as one."""
        with self._lock:
            self.reason = reason
            if self.closed:
                self._until = time.monotonic() + self._pause
                self._pause = min(2 * self._pause, _LONGEST)

    def worked(self) -> None:
        """The place has answered."""
        if self._until or self._pause != _FIRST:
            with self._lock:
                self._until, self._pause, self.reason = 0.0, _FIRST, ""
