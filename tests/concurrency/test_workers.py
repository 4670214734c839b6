"""Threads that work is handed to: in order, ended in time, and whole after an interrupt at any step."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
from interrupting import interrupted_at

from cachetune_rag.concurrency import workers
from cachetune_rag.concurrency.workers import CancelledError, Job, Workers


def test_calls_are_made_in_order_and_give_what_they_return_or_raise() -> None:
    made: list[int] = []
    with Workers(1, "test") as pool:
        jobs = [pool.submit(lambda n: made.append(n) or n * n, n) for n in range(50)]
        broken = pool.submit(int, "x")
        assert [job.result() for job in jobs] == [n * n for n in range(50)]
        with pytest.raises(ValueError, match="invalid literal"):
            broken.result()
        assert isinstance(broken.exception(), ValueError)
    assert made == list(range(50))
    with pytest.raises(RuntimeError, match="ended"):
        pool.submit(int)


def test_so_many_run_side_by_side() -> None:
    both = threading.Barrier(3, timeout=10)
    with Workers(3, "test") as pool:
        assert sorted(job.result() for job in [pool.submit(both.wait) for _ in range(3)]) == [0, 1, 2]


def test_what_has_not_begun_can_be_cancelled_and_what_has_is_waited_for() -> None:
    go, begun = threading.Event(), threading.Event()
    told: list[Job[Any]] = []
    with Workers(1, "test") as pool:
        first = pool.submit(lambda: begun.set() or go.wait(10))
        later = [pool.submit(int) for _ in range(3)]
        for job in (first, *later):
            job.add_done_callback(told.append)
        assert begun.wait(10)
        assert not first.cancel()
        assert later[0].cancel()
        assert later[0].cancel(), "it stays so"
        assert told == [later[0]]
        with pytest.raises(CancelledError):
            later[0].result()
        with pytest.raises(TimeoutError):
            first.result(0.01)
        assert not first.wait(0.0)
        pool.shutdown(wait=False, cancel_futures=True)
        assert all(job.cancelled() for job in later)
        go.set()
        assert first.result() is True
    assert set(told) == {first, *later}
    late: list[Job[Any]] = []
    first.add_done_callback(late.append)
    assert late == [first]


def test_nothing_is_held_of_what_is_over_and_threads_end_with_their_owner() -> None:
    class Thing:
        pass

    pool, thing = Workers(2, "test"), Thing()
    watched = weakref.ref(thing)

    def fail(_thing: Thing) -> None:
        raise ValueError("x")

    job = pool.submit(fail, thing)
    with pytest.raises(ValueError, match="x"):
        job.result()
    del thing, job
    until = time.monotonic() + 10
    while watched() is not None and time.monotonic() < until:
        gc.collect()
        time.sleep(0.01)
    assert watched() is None
    running = pool.running
    del pool
    assert all(ended.acquire(timeout=10) for ended in running)


def interrupted(step: int, work: Callable[[], object]) -> bool:
    """Run it with Ctrl-C before line number `step` of workers.py that it comes to; False if it ended before."""
    error = interrupted_at(step, workers, work)
    if error is not None and not isinstance(error, KeyboardInterrupt):
        raise error
    return error is not None


@pytest.mark.parametrize("slow", [0.0, 0.02], ids=["done at once", "waited for"])
def test_an_interrupt_at_any_line_leaves_threads_that_work(slow: float) -> None:
    with Workers(2, "test") as pool:
        for step in range(200):
            if not interrupted(step, lambda: pool.submit(time.sleep, slow).result()):
                break
            assert [pool.submit(int, n).result(10) for n in "123"] == [1, 2, 3], step
        assert 10 < step < 199
