"""Calls that may touch the store's disk, waited for no longer than a deadline.

A disk that doesn't answer (a network file system that is gone, a device that tries and tries again) can't be interrupted,
only left behind. So such calls are made on threads of their own. One that overruns goes on there; until it has come back, no
other is begun: requests then go on without the disk at once, instead of each waiting as long, and threads don't pile up.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from cachetune_rag.concurrency.workers import Job, Workers
from cachetune_rag.errors import ConfigError
from cachetune_store import StoreError
from cachetune_store.printing import shown

Call = Callable[..., Any]
"""`call(work, *args)` makes a call that may touch the store's disk, and returns what it returns."""

_READERS = 8
_CALLERS = 4
_P = ParamSpec("_P")
_T = TypeVar("_T")


def call_directly(work: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """A `Call` that waits as long as it takes."""
    return work(*args, **kwargs)


def check_timeout(seconds: float | None) -> None:
    """Refuse a `read_timeout` that can't be waited for.

    Raises:
        ConfigError: it is neither None nor a number of seconds above 0.
    """
    if seconds is None:
        return
    fits = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    if not fits or not 0 < seconds <= threading.TIMEOUT_MAX:
        raise ConfigError(f"read_timeout is {shown(seconds)}: use seconds above 0, or None to wait for ever.")


class StoreTimeoutError(StoreError):
    """The store's disk took longer than `read_timeout`, or hasn't come back from a call that did."""


class DeadlinePool:
    """Threads for reading rows, and threads for other calls into the store; safe to use from several threads.

    Args:
        seconds: how long one call is waited for; None: as long as it takes, and calls are made on the caller's thread.

    Raises:
        ConfigError: `seconds` is neither None nor above 0.
    """

    def __init__(self, seconds: float | None):
        check_timeout(seconds)
        self.seconds = seconds
        self._readers = Workers(_READERS, "cachetune-read")
        self._callers = Workers(_CALLERS, "cachetune-store")
        self._lock = threading.Lock()
        self._overdue: set[Job[Any]] = set()
        self._apart: set[Job[Any]] = set()  # of `begin`
        self._inside = threading.local()

    @property
    def overdue(self) -> bool:
        """Whether something that was given up is still under way."""
        return bool(self._overdue)

    def submit(self, work: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> Job[_T]:
        """Have rows read; `result` waits for them."""
        return self._readers.submit(work, *args, **kwargs)

    def result(self, future: Job[_T]) -> _T:
        """What the work returned.

        Raises:
            StoreTimeoutError: it hasn't ended in time.
        """
        try:
            return future.result(self.seconds)
        except TimeoutError:
            if future.done():
                raise  # the work's own
            self._leave(future)
            raise StoreTimeoutError(f"the store's disk didn't answer within {self.seconds:g} s") from None

    def settle(self, future: Job[Any]) -> None:
        """Return when the work has ended one way or the other, or is overdue."""
        if not future.cancel() and not self.overdue:
            try:
                future.exception(self.seconds)
            except TimeoutError:
                self._leave(future)

    def call(self, work: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """What `work(*args)` returns.

        Raises:
            StoreTimeoutError: it hasn't ended in time, and goes on; or something else that was given up is under way.
        """
        if self.seconds is None or getattr(self._inside, "call", False):
            return work(*args, **kwargs)
        if self.overdue:
            raise StoreTimeoutError("the store's disk hasn't come back from an earlier call")
        return self.result(self._callers.submit(self._inner, work, *args, **kwargs))

    def begin(self, work: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> Job[_T]:
        """Begin a call for somebody who waits for it on terms of his own: it never counts as overdue."""
        future = self._callers.submit(self._inner, work, *args, **kwargs)
        with self._lock:
            self._apart.add(future)
        future.add_done_callback(self._come_back)
        return future

    def close(self) -> None:
        """End the threads; what is overdue, or was begun by `begin`, is not waited for."""
        for pool in (self._readers, self._callers):
            pool.shutdown(wait=not self.overdue and not self._apart)

    def _inner(self, work: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        # A call inside of a call is waited for with that one; threads that wait for each other could all be taken.
        self._inside.call = True
        return work(*args, **kwargs)

    def _leave(self, future: Job[Any]) -> None:
        with self._lock:
            self._overdue.add(future)
        # If it was still in the queue, what keeps the threads busy is overdue: it counts as under way until its turn comes.
        future.add_done_callback(self._come_back)

    def _come_back(self, future: Job[Any]) -> None:
        with self._lock:
            self._overdue.discard(future)
            self._apart.discard(future)
