"""Calls that may touch the store's disk, and are waited for no longer than a deadline.

A read from a disk that doesn't answer (a network file system that is gone, say) can't be interrupted, only left behind. So such calls are
made on threads of their own, where a call that overruns goes on. Until it has ended, no other call is started: requests go on without the
disk at once, instead of each waiting as long, and threads don't pile up.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from cachetune_rag.checking.arguments import is_number
from cachetune_rag.concurrency.workers import Job, Workers
from cachetune_rag.errors import ConfigError
from cachetune_store import StoreError
from cachetune_store.printing import shown

Call = Callable[..., Any]
"""`call(work, *args)` makes a call that may touch the store's disk, and returns what it returns."""

READERS = 8
"""Threads that read from a disk: enough to keep it busy."""
FAR_READERS = 32
"""Threads that read where answers come over a network: they mostly wait."""
_CALLERS = 4
_P = ParamSpec("_P")
_T = TypeVar("_T")


def call_directly(work: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Make a `Call` on the caller's thread and wait as long as it takes."""
    return work(*args, **kwargs)


def check_timeout(seconds: float | None) -> None:
    """Refuse a `read_timeout` that is not a time.

    Raises:
        ConfigError: it is neither None nor a number of seconds above 0.
    """
    if seconds is None:
        return
    if not is_number(seconds, 0, threading.TIMEOUT_MAX) or not seconds:
        raise ConfigError(f"read_timeout is {shown(seconds)}: use seconds above 0, or None to wait for ever.")


class StoreTimeoutError(StoreError):
    """The store's disk took longer than `read_timeout`, or a call that did has still not ended."""


class DeadlinePool:
    """Threads that read rows, and threads for other calls into the store. Safe to use from several threads.

    Args:
        seconds: how long one call is waited for; None: as long as it takes, and `call` makes calls on the caller's thread.
        readers: threads that read rows.

    Raises:
        ConfigError: `seconds` is neither None nor above 0.
    """

    def __init__(self, seconds: float | None, readers: int = READERS):
        check_timeout(seconds)
        self.seconds = seconds
        self._readers = Workers(readers, "cachetune-read")
        self._callers = Workers(_CALLERS, "cachetune-store")
        self._lock = threading.Lock()
        self._overdue: set[Job[Any]] = set()
        self._apart: set[Job[Any]] = set()  # of `start_apart`
        self._inside = threading.local()

    @property
    def overdue(self) -> bool:
        """Whether a call that was left behind is still under way."""
        return bool(self._overdue)

    def submit(self, work: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> Job[_T]:
        """Have a reading thread make a call. `result` waits for it."""
        return self._readers.submit(work, *args, **kwargs)

    def result(self, future: Job[_T]) -> _T:
        """What a submitted call returns.

        Raises:
            StoreTimeoutError: it hasn't ended in time, and goes on.
        """
        try:
            return future.result(self.seconds)
        except TimeoutError:
            if future.done():
                raise  # the call itself raised it
            self._leave_behind(future)
            raise StoreTimeoutError(f"the store's disk didn't answer within {self.seconds:g} s") from None
        finally:
            del future  # its error refers to this frame: see `Job.result`

    def wait_or_leave(self, future: Job[Any]) -> None:
        """Cancel a submitted call. If it is under way, wait until it has ended or is overdue."""
        if not future.cancel() and not self.overdue:
            try:
                future.exception(self.seconds)
            except TimeoutError:
                self._leave_behind(future)

    def call(self, work: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """What `work(*args)` returns.

        Raises:
            StoreTimeoutError: it hasn't ended in time, and goes on; or an earlier call that was left behind is still under way.
        """
        if self.seconds is None or getattr(self._inside, "call", False):
            return work(*args, **kwargs)
        if self.overdue:
            raise StoreTimeoutError("the store's disk hasn't come back from an earlier call")
        return self.result(self._callers.submit(self._inner, work, *args, **kwargs))

    def start_apart(self, work: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> Job[_T]:
        """Start a call that the caller itself waits for. It never counts as overdue."""
        future = self._callers.submit(self._inner, work, *args, **kwargs)
        with self._lock:
            self._apart.add(future)
        future.add_done_callback(self._ended)
        return future

    def close(self) -> None:
        """End the threads. Calls that are overdue, or were started by `start_apart`, are not waited for."""
        for pool in (self._readers, self._callers):
            pool.shutdown(wait=not self.overdue and not self._apart)

    def _inner(self, work: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        # A call made inside of another is made on the same thread: if it needed a thread too, all threads could be waiting for one.
        self._inside.call = True
        return work(*args, **kwargs)

    def _leave_behind(self, future: Job[Any]) -> None:
        with self._lock:
            self._overdue.add(future)
        # A call that never got a thread counts as well, until it gets one: the calls that keep the threads busy are overdue.
        future.add_done_callback(self._ended)

    def _ended(self, future: Job[Any]) -> None:
        with self._lock:
            self._overdue.discard(future)
            self._apart.discard(future)
