"""Calls that may wait for the model, from an event loop.

`asyncio.to_thread` runs on the loop's default executor, a handful of threads that everything in the program shares: name
look-ups, other libraries' file reads, other requests. Requests that wait for their turn at the model would fill it, and all
of that would stand still with them. So each call here has a thread of its own.
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
    """A thread for the calls of one request, such as the pieces of a stream; it starts with the first call. A context manager.

    Each call sees the caller's context variables. A cancelled caller stops waiting; a call that runs can't be stopped, and
    runs to its end.
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="cachetune-async")

    async def call(self, function: Callable[..., T], *args: object) -> T:
        """What `function(*args)` returns, while the event loop goes on."""
        context = contextvars.copy_context()
        return await asyncio.get_running_loop().run_in_executor(self._executor, context.run, function, *args)

    def later(self, function: Callable[..., object], *args: object) -> None:
        """Have `function(*args)` called behind the call that runs; returns at once; its result and errors are dropped."""
        self._executor.submit(function, *args)

    def close(self) -> None:
        """Let the thread end once its calls have; returns at once."""
        self._executor.shutdown(wait=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


async def call_in_thread(function: Callable[..., T], *args: object) -> T:
    """What `function(*args)` returns; it runs on a thread of its own, as `asyncio.to_thread` does on a shared one."""
    with OwnThread() as thread:
        return await thread.call(function, *args)
