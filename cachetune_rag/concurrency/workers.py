"""A pool of threads that stays usable when Ctrl-C interrupts the thread that hands work to it.

`concurrent.futures` guards its executors and futures with locks that are taken in Python code. KeyboardInterrupt may be raised right after
such a lock was taken, and then it is never released; this can block all executors of the process. Here the only locks are the interpreter's
own and a queue written in C, of which each operation is a single step that Ctrl-C can't cut in two.
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
"""Polling interval of threads that wait for a job, seconds: another waiting thread may have been interrupted before it woke this one."""
_P = ParamSpec("_P")
_T = TypeVar("_T")
_log = logging.getLogger(__name__)


class Job(Generic[_T]):
    """A call that a worker is to make. Its methods do what those of `concurrent.futures.Future` do that have the same names."""

    def __init__(self, work: Callable[[], _T]):
        self._work: Callable[[], _T] | None = work
        self._begun = _thread.allocate_lock()  # taken by the thread that runs or cancels it
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
        # The error's frames refer to this one, as the frame that called them. If it kept the job, which has the error, only Python's collector would free
        # the job, and with it all that the call worked on.
        del self

    def cancel(self) -> bool:
        """Keep the call from being made. Returns False if it was begun before."""
        if not self._origin.here:
            return True  # it won't be made in this process; `wait` says so
        if not self._begun.acquire(blocking=False):
            return self._cancelled
        self._cancelled, self._work, self._error = True, None, CancelledError()
        self._end()
        return True

    def cancelled(self) -> bool:
        """Whether the call was cancelled."""
        return self._cancelled

    def done(self) -> bool:
        """Whether the call has ended or was cancelled."""
        return self._done

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the call has ended or was cancelled. Returns False if that took longer than `timeout` seconds.

        Raises:
            ForkedError: this process was forked after the job was made, and its thread stayed in the other one.
        """
        until = None if timeout is None else time.monotonic() + timeout
        while not self._done:
            self._origin.check()
            left = _LOOK if until is None else min(_LOOK, until - time.monotonic())
            if left <= 0:
                return False
            if self._ended.acquire(timeout=left):  # if Ctrl-C comes right here, others find out by `_done`
                self._ended.release()
        return True

    def result(self, timeout: float | None = None) -> _T:
        """What the call returned. What it raised is raised again.

        Raises:
            TimeoutError: it hasn't ended after `timeout` seconds.
            CancelledError: it was cancelled.
        """
        error = self.exception(timeout, cancelled=True)
        try:
            if error is not None:
                raise error
            return self._value  # type: ignore[return-value]
        finally:
            del error, self  # the error holds this frame: if the frame held the error, neither would be freed soon

    def exception(self, timeout: float | None = None, *, cancelled: bool = False) -> BaseException | None:
        """What the call raised, or None.

        Raises:
            TimeoutError: it hasn't ended after `timeout` seconds.
            CancelledError: it was cancelled. With `cancelled=True` it is returned instead.
        """
        if not self.wait(timeout):
            raise TimeoutError
        if self._cancelled and not cancelled:
            raise CancelledError
        return self._error

    def add_done_callback(self, call: Callable[[Job[_T]], Any]) -> None:
        """Have `call(job)` made once the job is done, on the thread that ends it; at once if it is done already."""
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
    """Threads that make calls in the order in which they are submitted. A context manager: see `shutdown`.

    The threads start when they are needed. They end when the pool is shut down or garbage-collected; a process that ends doesn't wait
    for them.

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
            RuntimeError: the pool was shut down.
            ForkedError: this process was forked after the pool was made, and its threads stayed in the other one.
        """
        self._origin.check()
        if self._is_closed():
            raise RuntimeError("the threads have been ended")
        job = Job(partial(work, *args, **kwargs))
        self._queue.put(job)
        if self._begun < self._count:
            # In this order, an interrupt in between leads to one thread too many rather than one too few.
            _thread.start_new_thread(_run, (self._queue, self.running, self._name))
            self._begun += 1
        if self._is_closed():  # it was shut down meanwhile, so perhaps no thread will make the call
            job.cancel()
        return job

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more calls, and end the threads after the calls that were submitted.

        Args:
            wait: return when the threads have ended.
            cancel_futures: cancel the calls that have not begun.
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
            with ended:  # in one step with its release, whatever Ctrl-C interrupts
                pass

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
            del job  # or it would be kept until the next one comes
        queue.put(None)  # for the next thread
    finally:
        ended.release()
