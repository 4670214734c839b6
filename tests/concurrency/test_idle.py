"""Work in the background: in order, each item once, given up when told to, and never lost in between."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cachetune_rag.concurrency.idle import IdleQueue
from cachetune_rag.concurrency.model_lock import ModelLock

WAIT = 60


@dataclass
class Item:
    """Equal to any other of its name, as two requests for the same chunk may be."""

    name: str


@dataclass
class Work:
    """A queue whose attempts take their course from `attempt`."""

    attempt: Callable[[Item], bool]
    model: ModelLock = field(default_factory=ModelLock)
    done: list[Item] = field(default_factory=list)
    dropped: list[Item] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.queue: IdleQueue[Item] = IdleQueue("cachetune-test", self.model, self._attempt, self.dropped.append)

    def put(self, *items: Item) -> list[bool]:
        with self.queue.mutex:
            return [self.queue.put(item) for item in items]

    def _attempt(self, item: Item) -> None:
        if self.attempt(item):
            with self.queue.mutex:
                if self.queue.done(item):
                    self.done.append(item)


def threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "cachetune-test"]


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Opened at the end, so that no failed test leaves a thread behind."""
    event = threading.Event()
    yield event
    event.set()


def test_items_are_worked_on_in_order_and_the_thread_ends() -> None:
    work = Work(lambda item: True)
    items = [Item("a"), Item("b"), Item("c")]
    assert work.put(*items) == [True] * 3
    assert work.queue.wait(WAIT)
    assert work.done == items
    assert (len(work.queue), work.dropped) == (0, [])
    for thread in threads():
        thread.join(WAIT)
    assert not work.queue.busy
    work.put(Item("d"))
    assert work.queue.wait(WAIT)
    assert work.done[-1] == Item("d")


def test_an_item_that_is_not_done_is_had_again_before_the_next() -> None:
    tried: list[str] = []

    def attempt(item: Item) -> bool:
        tried.append(item.name)
        return tried.count("a") == 3

    work = Work(attempt)
    work.put(Item("a"), Item("b"))
    assert work.queue.wait(WAIT)
    assert tried == ["a", "a", "a", "b"]


def test_an_equal_item_is_another_one(gate: threading.Event) -> None:
    begun = threading.Event()

    def attempt(item: Item) -> bool:
        begun.set()
        return gate.wait(WAIT)

    first, second = Item("a"), Item("a")
    work = Work(attempt)
    work.put(first)
    assert begun.wait(WAIT)
    with work.queue.mutex:
        work.queue.clear()
        assert work.queue.put(second)
        assert not work.queue.done(first)
        assert work.queue.is_first(second)
        assert not work.queue.is_first(first)
    gate.set()
    assert work.queue.wait(WAIT)
    assert [id(item) for item in work.dropped] == [id(first)]
    assert [id(item) for item in work.done] == [id(second)]


@pytest.mark.parametrize("outcome", ["done", "again", "failed"])
def test_an_item_cleared_while_it_is_worked_on_is_dropped_once_and_does_not_come_back(
    outcome: str, gate: threading.Event
) -> None:
    begun, tried = threading.Event(), []

    def attempt(item: Item) -> bool:
        tried.append(item.name)
        if item.name == "later":
            return True
        begun.set()
        gate.wait(WAIT)
        if outcome == "failed":
            raise ValueError
        return outcome == "done"

    work = Work(attempt)
    work.put(Item("a"), Item("b"))
    assert begun.wait(WAIT)
    with work.queue.mutex:
        work.queue.clear()
    assert work.put(Item("later")) == [True]
    gate.set()
    assert work.queue.wait(WAIT)
    assert tried == ["a", "later"]
    assert (work.dropped, work.done) == ([Item("a"), Item("b")], [Item("later")])


def test_work_that_fails_is_logged_and_not_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    def attempt(item: Item) -> bool:
        return item.name != "a" or bool(1 / 0)

    work = Work(attempt)
    work.put(Item("a"), Item("b"))
    assert work.queue.wait(WAIT)
    assert (work.dropped, work.done) == ([Item("a")], [Item("b")])
    assert "ZeroDivisionError" in caplog.text
    assert "cachetune-test" in caplog.text


def test_dropping_ends_the_work_under_way_and_takes_no_more() -> None:
    begun = threading.Event()
    work: Work

    def attempt(item: Item) -> bool:
        begun.set()
        assert not work.queue.wait_idle()
        return work.queue.dropped

    work = Work(attempt)
    with work.model.reserved():  # the model is never idle
        work.put(Item("a"), Item("b"))
        assert begun.wait(WAIT)
        work.queue.drop()
        assert (work.done, work.dropped) == ([Item("a")], [Item("b")])
    assert work.put(Item("c")) == [False]
    assert not work.queue.busy


def test_closed_it_ends_what_waits_and_takes_no_more(gate: threading.Event) -> None:
    work = Work(lambda item: gate.wait(WAIT))
    work.put(Item("a"), Item("b"))
    work.queue.close()
    assert work.put(Item("c")) == [False]
    gate.set()
    assert work.queue.wait(WAIT)
    assert work.done == [Item("a"), Item("b")]


def test_waiting_for_idle_ends_by_patience_by_hurry_or_by_idleness() -> None:
    work = Work(lambda item: True)
    with work.model.reserved():
        assert not work.queue.wait_idle(0.001)
        with work.queue.in_a_hurry():
            assert work.queue.hurried
            assert not work.queue.wait_idle()
        assert not work.queue.hurried
        waiting, found = threading.Event(), []

        def wait() -> None:
            waiting.set()
            found.append(work.queue.wait_idle())

        thread = threading.Thread(target=wait)
        thread.start()
        assert waiting.wait(WAIT)
        with work.queue.in_a_hurry():
            thread.join(WAIT)
        assert found == [False]
    assert work.queue.wait_idle(WAIT)


def test_one_item_is_waited_for_without_those_behind_it(gate: threading.Event) -> None:
    passed = threading.Event()
    work = Work(lambda item: (passed if item.name == "a" else gate).wait(WAIT))
    first = Item("a")
    work.put(first, Item("b"))
    waiter = threading.Thread(target=work.queue.wait_for, args=[first])
    waiter.start()
    assert not work.queue.wait(0.001)
    passed.set()
    waiter.join(WAIT)
    assert not waiter.is_alive()
    assert work.done == [first]


def test_a_thread_that_ctrl_c_kept_from_starting_is_started_by_who_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: threading.Thread) -> None:
        raise KeyboardInterrupt

    def interrupt(work: Work) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", interrupted)
            with pytest.raises(KeyboardInterrupt):
                work.put(Item("a"))

    work = Work(lambda item: True)
    interrupt(work)
    assert work.queue.wait(WAIT)
    assert work.done == [Item("a")]

    given_up = Work(lambda item: True)
    interrupt(given_up)
    given_up.queue.drop()
    assert (given_up.done, given_up.dropped) == ([], [Item("a")])


def test_a_process_that_ends_waits_for_the_work_under_way_alone() -> None:
    code = (
        "import sys, threading; sys.path.insert(0, 'concurrency')\n"
        "from test_idle import Item, Work\n"
        "def attempt(item):\n"
        "    begun.set(); work.queue.wait_idle(); print(item.name, work.queue.dropped); return True\n"
        "begun, work = threading.Event(), Work(attempt)\n"
        "context = work.model.reserved(); context.__enter__()\n"
        "work.put(Item('a'), Item('b')); begun.wait()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=WAIT
    )
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "a True", "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_in_a_forked_process_it_is_somebody_elses(gate: threading.Event) -> None:
    work = Work(lambda item: gate.wait(WAIT))
    work.put(Item("a"))
    with work.queue.mutex:  # stays locked in the child
        child = os.fork()
        if child == 0:
            signal.alarm(WAIT)
            work.queue.drop()
            os._exit(42 if not work.queue.here else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 42
    gate.set()
    assert work.queue.wait(WAIT)
    assert work.done == [Item("a")]
