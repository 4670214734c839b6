"""Calls that are made from an event loop and may wait for the model.

`asyncio.to_thread` uses the loop's default executor, a few threads that everything in the program shares, such as name look-ups and other
libraries' file reads. Requests that wait for the model would take all of them, and the rest of the program would stand still. So each
call here has a thread of its own.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self, TypeVar

T = TypeVar("T")


class OwnThread:
    """A thread for the calls of one request, such as the pieces of a stream. It starts with the first call. A context manager.

    Each call sees the caller's context variables. A caller that is cancelled stops waiting, but a call that runs goes on to its end.
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="cachetune-async")

    async def call(self, function: Callable[..., T], *args: object) -> T:
        """What `function(*args)` returns, while the event loop goes on."""
        context = contextvars.copy_context()
        return await asyncio.get_running_loop().run_in_executor(self._executor, context.run, function, *args)

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
