"""The lock around the model: requests first, background work where none is there."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from weakref import WeakSet


class _Token:
    """Somebody wants the model, for as long as this lives."""


class ModelLock(type(threading.RLock())):  # type: ignore[misc]
    """A reentrant lock that knows whether a request wants it: `with lock.reserved(), lock:`. `background` never keeps one waiting.

    Taking it in the background means to let go soon after `wanted` has become true.

    It *is* Python's lock, and who wants it is kept apart from who holds it, because Ctrl-C may come between any two steps of
    Python code: around a lock that would leave it locked for ever.

    Attributes:
        mutex: guards the book of who wants the lock.
    """

    def __init__(self) -> None:
        self._requests: WeakSet[_Token] = WeakSet()
        # Reentrant as well: a stream that is given up is finished by the garbage collector, which may come by anywhere.
        self.mutex = threading.RLock()
        self._changed = threading.Condition(self.mutex)
        self._idle_since = time.monotonic()

    def renew(self) -> None:
        """In a forked process: what another thread held inside of here at the fork is free again. Whoever held the lock itself has
        stayed in the parent, so nothing is to be run under it any more."""
        self.mutex = threading.RLock()
        self._changed = threading.Condition(self.mutex)

    @property
    def wanted(self) -> bool:
        """Whether a request has reserved the model."""
        return len(self._requests) > 0

    @contextmanager
    def reserved(self) -> Iterator[None]:
        """Keep background work away; also between two uses of the lock (two tokens of an answer, say)."""
        token = _Token()
        try:
            with self.mutex:
                self._requests.add(token)
            yield
        finally:
            with self.mutex:
                self._requests.discard(token)
                if not self._requests:
                    self._idle_since = time.monotonic()
                    self._changed.notify_all()

    @contextmanager
    def background(self) -> Iterator[bool]:
        """Hold the lock if no request wants it; gives whether it is held."""
        with self.mutex:
            held = not self._requests and self.acquire(blocking=False)
        try:
            yield held
        finally:
            if held:
                self.release()

    def wait_idle(self, seconds: float, stop: Callable[[], bool], timeout: float | None = None) -> bool:
        """Wait until no request has wanted the model for so long; False as soon as `stop()` (see `wake`), or after `timeout` seconds."""
        until = math.inf if timeout is None else time.monotonic() + timeout
        with self.mutex:
            while not stop():
                now = time.monotonic()
                rest = math.inf if self._requests else self._idle_since + seconds - now
                if rest <= 0:
                    return True
                if until <= now:
                    return False
                least = min(rest, until - now)
                self._changed.wait(None if least == math.inf else least)
        return False

    def wake(self) -> None:
        """Let `wait_idle` look at its `stop` again."""
        with self.mutex:
            self._changed.notify_all()
