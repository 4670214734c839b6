"""Calls from an event loop have threads of their own: waiting ones take nothing from the rest of the program."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from cachetune_rag.concurrency.async_calls import OwnThread, call_in_thread, check_cancelled

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


async def test_a_call_that_asks_learns_of_the_cancellation_at_once() -> None:
    """The loop's thread does nothing between the cancellation and the call's question, as when the call holds the interpreter."""
    begun, ask, ended = threading.Event(), threading.Event(), threading.Event()
    said: list[type[BaseException] | None] = []

    def call() -> None:
        check_cancelled()  # nobody has cancelled it yet
        begun.set()
        ask.wait(60)
        try:
            check_cancelled()
            said.append(None)
        except BaseException as error:
            said.append(type(error))
            raise
        finally:
            ended.set()

    task = asyncio.ensure_future(call_in_thread(call))
    while not begun.is_set():
        await asyncio.sleep(0)
    task.cancel()
    ask.set()
    assert ended.wait(60)
    assert said == [asyncio.CancelledError]
    with pytest.raises(asyncio.CancelledError):
        await task
    check_cancelled()  # other code is never ended by it
    assert await call_in_thread(lambda: check_cancelled() or "another call") == "another call"


async def test_a_call_that_had_not_begun_when_it_was_cancelled_is_not_made() -> None:
    let_go, made = threading.Event(), []
    with OwnThread() as thread:
        first = asyncio.ensure_future(thread.call(let_go.wait, 60))
        second = asyncio.ensure_future(thread.call(made.append, 1))
        await asyncio.sleep(0)
        second.cancel()
        let_go.set()
        assert await first
        with pytest.raises(asyncio.CancelledError):
            await second
        assert await thread.call(len, made) == 0


async def test_a_call_that_raises_what_no_future_can_hold_still_ends() -> None:
    with pytest.raises(RuntimeError, match="StopIteration"):
        await call_in_thread(next, iter(()))
