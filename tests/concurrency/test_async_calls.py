"""Calls from an event loop have threads of their own: waiting ones take nothing from the rest of the program."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from cachetune_rag.concurrency.async_calls import OwnThread, call_in_thread

_NAME = contextvars.ContextVar("_NAME", default="nobody")


async def test_waiting_calls_leave_the_default_executor_free() -> None:
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(max_workers=1))
    let_go = threading.Event()
    waiting = [asyncio.ensure_future(call_in_thread(let_go.wait, 60)) for _ in range(50)]
    try:
        assert await asyncio.wait_for(asyncio.to_thread(lambda: "free"), 30) == "free"
    finally:
        let_go.set()
    assert await asyncio.gather(*waiting) == [True] * 50


async def test_a_call_sees_the_callers_context_and_its_errors_arrive() -> None:
    _NAME.set("caller")
    assert await call_in_thread(_NAME.get) == "caller"
    with pytest.raises(ZeroDivisionError):
        await call_in_thread(lambda: 1 // 0)


async def test_a_request_keeps_its_thread_and_gives_it_back() -> None:
    with OwnThread() as thread:
        used = {await thread.call(threading.current_thread) for _ in range(5)}
    assert len(used) == 1
    (ended,) = used
    await asyncio.to_thread(ended.join, 30)
    assert not ended.is_alive()


async def test_a_cancelled_caller_stops_waiting() -> None:
    let_go, finished = threading.Event(), threading.Event()

    def call() -> None:
        let_go.wait(60)
        finished.set()

    task = asyncio.ensure_future(call_in_thread(call))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    let_go.set()
    assert await asyncio.to_thread(finished.wait, 30), "a call that runs can't be stopped, and runs to its end"
