"""Calls that are made from an event loop and may wait for the model.

`asyncio.to_thread` uses the loop's default executor, a few threads that everything in the program shares, such as name look-ups and other
libraries' file reads. Requests that wait for the model would take all of them, and the rest of the program would stand still. So each
call here has a thread of its own.

A thread can't be interrupted from outside. So a call whose task was cancelled has to find that out, at points where it can end: that is
what `check_cancelled` is for.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Self, TypeVar

T = TypeVar("T")


class OwnThread:
    """A thread for the calls of one request, such as the pieces of a stream. It starts with the first call. A context manager.

    Each call sees the caller's context variables. A caller that is cancelled stops waiting. A call that runs goes on to its end, unless
    it asks `check_cancelled`.
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="cachetune-async")

    async def call(self, function: Callable[..., T], *args: object) -> T:
        """What `function(*args)` returns, while the event loop goes on."""
        waiting = _Waiting(asyncio.get_running_loop())
        context = contextvars.copy_context()
        context.run(_WAITING.set, waiting)
        waiting.follow(self._executor.submit(context.run, function, *args))
        return await waiting

    def later(self, function: Callable[..., object], *args: object) -> None:
        """Have `function(*args)` called after the calls so far. Returns at once. Its result and its errors are dropped."""
        self._executor.submit(function, *args)

    def close(self) -> None:
        """Let the thread end after its calls. Returns at once."""
        self._executor.shutdown(wait=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


async def call_in_thread(function: Callable[..., T], *args: object) -> T:
    """What `function(*args)` returns. It is called on a thread of its own, unlike with `asyncio.to_thread`."""
    with OwnThread() as thread:
        return await thread.call(function, *args)


def check_cancelled() -> None:
    """End a call of `OwnThread` whose task was cancelled. In any other code this does nothing.

    Raises:
        asyncio.CancelledError: nobody waits for the call any more. It passes by handlers of `Exception`, as in the task itself.
    """
    waiting = _WAITING.get()
    if waiting is not None and waiting.cancelled_at_once:
        raise asyncio.CancelledError("the task that waits for this call was cancelled")


class _Waiting(asyncio.Future[Any]):
    """What a task awaits while its call runs on another thread.

    `asyncio.wrap_future` would tell the call of a cancellation in a later round of the event loop. Until then the call's thread may hold
    the interpreter for many tokens. Here the call is told within `task.cancel()`.

    Attributes:
        cancelled_at_once: whether the task was cancelled. Set on the loop's thread, read on the call's.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop):
        super().__init__(loop=loop)
        self.cancelled_at_once = False
        self._call: Future[Any] | None = None

    def follow(self, call: Future[Any]) -> None:
        """Take over what `call` returns or raises."""
        self._call = call
        call.add_done_callback(self._ended)

    def cancel(self, msg: Any = None) -> bool:
        """As in asyncio; a call that hasn't begun won't be made."""
        self.cancelled_at_once = True
        if self._call is not None:
            self._call.cancel()
        return super().cancel(msg)

    def _ended(self, call: Future[Any]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop was closed, so nobody waits
            self.get_loop().call_soon_threadsafe(self._take_over, call)

    def _take_over(self, call: Future[Any]) -> None:
        self._call = None  # they refer to each other
        if self.done():
            return
        error = call.exception()
        if isinstance(error, StopIteration):  # no future can raise it
            error = RuntimeError("the call raised StopIteration")
        if error is None:
            self.set_result(call.result())
        else:
            self.set_exception(error)


_WAITING: ContextVar[_Waiting | None] = ContextVar("_WAITING", default=None)
"""Who waits for the running call."""
