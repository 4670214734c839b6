"""Taking turns with vLLM's steps."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from cachetune_vllm.turns import Turns, TurnsEndedError

SECONDS = 30


def started(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def wait_wanted(turns: Turns) -> None:
    with turns.changed:
        assert turns.changed.wait_for(lambda: turns.wanted, timeout=SECONDS)


def test_a_turn_ends_when_it_is_used_up_and_goes_on_with_the_next() -> None:
    turns, done = Turns(lambda _: True), list[int]()

    def work() -> None:
        with turns.taken():
            for number in range(5):
                done.append(number)
                turns.spend(10)

    thread = started(work)
    wait_wanted(turns)
    assert done == []
    turns.lend(20)
    assert done == [0, 1]
    wait_wanted(turns)
    turns.lend(None)
    thread.join(SECONDS)
    assert done == [0, 1, 2, 3, 4]
    assert not turns.wanted


@pytest.mark.parametrize("alike", [True, False])
def test_an_error_ends_the_server_if_others_went_on(alike: bool) -> None:
    turns, raised = Turns(lambda _: alike), list[Exception]()

    def work() -> None:
        try:
            with turns.taken():
                raise ValueError
        except ValueError as error:
            raised.append(error)

    thread = started(work)
    wait_wanted(turns)
    if alike:
        turns.lend(None)
    else:
        with pytest.raises(RuntimeError, match="out of step"):
            turns.lend(None)
    thread.join(SECONDS)
    assert raised


def test_a_thread_that_waits_ends_with_the_server() -> None:
    turns, ended = Turns(lambda _: True), list[bool]()

    def work() -> None:
        try:
            with turns.taken():
                pass
        except TurnsEndedError:
            ended.append(True)

    thread = started(work)
    wait_wanted(turns)
    turns.end()
    thread.join(SECONDS)
    assert ended


def test_what_is_done_meanwhile_is_done_until_the_turn_is_lent() -> None:
    turns, calls, done = Turns(lambda _: True), list[int](), list[int]()
    some = threading.Semaphore(0)

    def meanwhile() -> None:
        calls.append(len(done))
        some.release()

    def work() -> None:
        with turns.taken(meanwhile):
            done.append(len(calls))

    thread = started(work)
    for _ in range(3):
        assert some.acquire(timeout=SECONDS)
    assert turns.wanted
    turns.lend(None)
    thread.join(SECONDS)
    assert set(calls) == {0}
    assert done == [len(calls)]


def test_what_fails_meanwhile_fails_in_the_turn() -> None:
    """Peers take it for granted that the thread has its turn."""
    had, raised = list[bool](), list[Exception]()
    turns = Turns(lambda _: had.append(turns.wanted) is None)

    def fail() -> None:
        raise ValueError("no memory")

    def work() -> None:
        try:
            with turns.taken(fail):
                raise AssertionError
        except ValueError as error:
            raised.append(error)

    thread = started(work)
    wait_wanted(turns)
    assert not raised
    turns.lend(None)
    thread.join(SECONDS)
    assert [str(error) for error in raised] == ["no memory"]
    assert had == [False]  # others were asked whether they failed alike, inside of the turn
