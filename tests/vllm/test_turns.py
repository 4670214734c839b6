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
