"""The lock around the model: requests first, background work where none is there."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType


class ModelLock:
    """A reentrant lock that knows who wants it. `with lock:` is for requests; `background` never keeps one waiting.

    Taking it in the background means to let go soon after `wanted` has become true.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._requests = 0
        self._changed = threading.Condition()
        self._idle_since = time.monotonic()

    @property
    def wanted(self) -> bool:
        """Whether a request holds the lock, waits for it, or has reserved the model."""
        return self._requests > 0

    def __enter__(self) -> None:
        self._arrive()
        try:
            self._lock.acquire()
        except BaseException:
            self._leave()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()
        self._leave()

    @contextmanager
    def reserved(self) -> Iterator[None]:
        """Keep background work away between two uses of the lock (two tokens of an answer, say)."""
        self._arrive()
        try:
            yield
        finally:
            self._leave()

    @contextmanager
    def background(self) -> Iterator[bool]:
        """Hold the lock if no request wants it; gives whether it is held."""
        with self._changed:
            held = not self._requests and self._lock.acquire(blocking=False)
        try:
            yield held
        finally:
            if held:
                self._lock.release()

    def wait_idle(self, seconds: float, stop: Callable[[], bool]) -> bool:
        """Wait until no request has wanted the model for so long; False as soon as `stop()` (see `wake`)."""
        with self._changed:
            while not stop():
                rest = None if self._requests else self._idle_since + seconds - time.monotonic()
                if rest is not None and rest <= 0:
                    return True
                self._changed.wait(rest)
        return False

    def wake(self) -> None:
        """Let `wait_idle` look at its `stop` again."""
        with self._changed:
            self._changed.notify_all()

    def _arrive(self) -> None:
        with self._changed:
            self._requests += 1

    def _leave(self) -> None:
        with self._changed:
            self._requests -= 1
            if not self._requests:
                self._idle_since = time.monotonic()
                self._changed.notify_all()
