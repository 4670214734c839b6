"""The lock around the model. Requests come first; background work gets the model when no request wants it."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from weakref import WeakSet


class _Token:
    """Stands for one request that wants the model. If its owner is interrupted and loses it, garbage collection removes it."""


class ModelLock(type(threading.RLock())):  # type: ignore[misc]
    """A reentrant lock that knows whether a request wants it.

    A request takes it by `with lock.reserved(), lock:`. Background work takes it by `background`, and has to release it soon after `wanted`
    has become true.

    The class derives from Python's own lock, and requests that want it are recorded apart from that. Ctrl-C may come between any two steps
    of Python code; in code around a lock, it could leave the lock locked for ever.

    Attributes:
        mutex: guards the record of the requests that want the lock.
    """

    def __init__(self) -> None:
        self._requests: WeakSet[_Token] = WeakSet()
        # Reentrant as well: garbage collection may come at any point, and finishes streams that were given up.
        self.mutex = threading.RLock()
        self._changed = threading.Condition(self.mutex)
        self._idle_since = time.monotonic()

    def renew(self) -> None:
        """In a forked process, replace the mutex, which a thread of the parent may have held. The lock itself may still be held by a
        thread of the parent, so nothing may run under it any more."""
        self.mutex = threading.RLock()
        self._changed = threading.Condition(self.mutex)

    @property
    def wanted(self) -> bool:
        """Whether a request has reserved the model."""
        return len(self._requests) > 0

    @contextmanager
    def reserved(self) -> Iterator[None]:
        """Keep background work away from the model, also while the lock is free, as between two tokens of an answer."""
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
        """Hold the lock if no request wants it and it is free. Yields whether it is held. Never waits."""
        with self.mutex:
            held = not self._requests and self.acquire(blocking=False)
        try:
            yield held
        finally:
            if held:
                self.release()

    def wait_idle(self, seconds: float, stop: Callable[[], bool], timeout: float | None = None) -> bool:
        """Wait until no request has wanted the model for some time.

        Args:
            seconds: for how long none must have wanted it.
            stop: ends the wait when it returns True. It is asked again after `wake`.
            timeout: the longest wait, in seconds; None: as long as it takes.

        Returns:
            False if `stop` or `timeout` ended the wait.
        """
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
        """Let `wait_idle` ask its `stop` again."""
        with self.mutex:
            self._changed.notify_all()
