"""Threads that work is handed to, built so that Ctrl-C in the thread which hands it over can't leave a lock locked.

`concurrent.futures` guards its executors and futures with locks that are Python code. KeyboardInterrupt may be raised right
behind the acquiring of one, and then it is never released; an executor's own semaphore takes the lock of all executors in the
process with it. Here the only locks are the interpreter's, of which waiting and releasing are one step each, and a queue that is
one step as well.
"""

from __future__ import annotations

import _thread
import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import CancelledError
from functools import partial
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Generic, ParamSpec, Self, TypeVar

from cachetune_rag.concurrency.forks import this_process

_LOOK = 1.0
"""Seconds after which one who waits looks whether it is over, in case another who waited was interrupted."""
_P = ParamSpec("_P")
_T = TypeVar("_T")
_log = logging.getLogger(__name__)


class Job(Generic[_T]):
    """A call that a worker makes, has made, or won't make. As `concurrent.futures.Future`, where they have the same methods."""

    def __init__(self, work: Callable[[], _T]):
        self._work: Callable[[], _T] | None = work
        self._begun = _thread.allocate_lock()  # taken by whoever runs or cancels it
        self._ended = _thread.allocate_lock()
        self._ended.acquire()
        self._done = self._cancelled = False
        self._origin = this_process()
        self._value: _T | None = None
        self._error: BaseException | None = None
        self._callbacks: deque[Callable[[Job[_T]], Any]] = deque()

    def run(self) -> None:
        """Make the call, unless it was cancelled."""
        work, self._work = self._work, None
        if work is None or not self._begun.acquire(blocking=False):
            return
        try:
            self._value = work()
        except BaseException as error:
            self._error = error
        del work
        self._end()

    def cancel(self) -> bool:
        """Whether the call won't be made."""
        if not self._origin.here:
            return True  # not here; who waits for it to end is told so
        if not self._begun.acquire(blocking=False):
            return self._cancelled
        self._cancelled, self._work, self._error = True, None, CancelledError()
        self._end()
        return True

    def cancelled(self) -> bool:
        """Whether it was cancelled."""
        return self._cancelled

    def done(self) -> bool:
        """Whether it is over, one way or the other."""
        return self._done

    def wait(self, timeout: float | None = None) -> bool:
        """Return when it is over; False if that took longer than `timeout` seconds.

        Raises:
            ForkedError: this process was forked meanwhile; the worker is another's.
        """
        until = None if timeout is None else time.monotonic() + timeout
        while not self._done:
            self._origin.check()
            left = _LOOK if until is None else min(_LOOK, until - time.monotonic())
            if left <= 0:
                return False
            if self._ended.acquire(timeout=left):
                self._ended.release()
        return True

    def result(self, timeout: float | None = None) -> _T:
        """What the call returned, or raised.

        Raises:
            TimeoutError: it isn't over after `timeout` seconds.
            CancelledError: it was cancelled.
        """
        error = self.exception(timeout, cancelled=True)
        try:
            if error is not None:
                raise error
            return self._value  # type: ignore[return-value]
        finally:
            del error, self  # an error holds this frame; the frame is not to hold the error

    def exception(self, timeout: float | None = None, *, cancelled: bool = False) -> BaseException | None:
        """What the call raised, or None.

        Raises:
            TimeoutError: it isn't over after `timeout` seconds.
            CancelledError: it was cancelled; with `cancelled` that is returned.
        """
        if not self.wait(timeout):
            raise TimeoutError
        if self._cancelled and not cancelled:
            raise CancelledError
        return self._error

    def add_done_callback(self, call: Callable[[Job[_T]], Any]) -> None:
        """Have `call(job)` made when it is over, on the thread that ends it; or at once."""
        self._callbacks.append(call)
        if self._done:
            self._call_back()

    def _end(self) -> None:
        self._done = True
        self._ended.release()
        self._call_back()

    def _call_back(self) -> None:
        while True:
            try:
                call = self._callbacks.popleft()
            except IndexError:
                return
            try:
                call(self)
            except Exception:
                _log.exception("a callback of a worker failed")


class Workers:
    """Threads that make calls in the order in which they are handed over. A context manager: see `shutdown`.

    They are begun when needed, and end when this is closed or nobody has it any more; a process doesn't wait for them.

    Args:
        count: how many, at most.
        name: of the threads.

    Attributes:
        running: a lock for each thread, which is released when the thread ends.
    """

    def __init__(self, count: int, name: str):
        self._count, self._begun, self._closed = count, 0, False
        self._name, self._origin = name, this_process()
        self._queue: SimpleQueue[Job[Any] | None] = SimpleQueue()
        self.running: list[Any] = []
        weakref.finalize(self, self._queue.put, None)

    def submit(self, work: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> Job[_T]:
        """Have `work(*args, **kwargs)` called.

        Raises:
            RuntimeError: this is closed.
            ForkedError: this process was forked since this was made, and its threads stayed in the other one.
        """
        self._origin.check()
        if self._is_closed():
            raise RuntimeError("the threads have been ended")
        job = Job(partial(work, *args, **kwargs))
        self._queue.put(job)
        if self._begun < self._count:
            # In this order: interrupted in between, it is one thread too many rather than one too few.
            _thread.start_new_thread(_run, (self._queue, self.running, self._name))
            self._begun += 1
        if self._is_closed():  # meanwhile: nobody may come to it
            job.cancel()
        return job

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more calls, and end the threads behind those that were handed over.

        Args:
            wait: return when they have ended.
            cancel_futures: cancel what has not begun.
        """
        self._closed = True
        if not self._origin.here:
            return
        while cancel_futures:
            try:
                job = self._queue.get_nowait()
            except Empty:
                break
            if job is not None:
                job.cancel()
        self._queue.put(None)
        for ended in list(self.running) if wait else ():
            ended.acquire()
            ended.release()

    def _is_closed(self) -> bool:
        return self._closed

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()


def _run(queue: SimpleQueue[Job[Any] | None], running: list[Any], name: str) -> None:
    threading.current_thread().name = name
    ended = _thread.allocate_lock()
    ended.acquire()
    running.append(ended)
    try:
        while (job := queue.get()) is not None:
            job.run()
            del job  # while nothing is to do, nothing is held
        queue.put(None)  # for the next thread
    finally:
        ended.release()
