"""When a worker begins with a prompt, and when it hands its pages over, without a model."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cachetune_rag.concurrency.model_lock import ModelLock
from cachetune_rag.errors import CacheTuneError, ConfigError
from cachetune_rag.model.heads import ALL_HEADS, PeerError
from cachetune_rag.reuse.prompt_room import NoRoomError, PromptRoom
from cachetune_rag.text.recognising.id_spans import IdSpan, prompt_of_ids
from cachetune_vllm import worker as worker_module
from cachetune_vllm.coming import GivenUpError
from cachetune_vllm.divided_heads import HeadsInTurns
from cachetune_vllm.failures import left_after
from cachetune_vllm.messages import Load, ToWorkers
from cachetune_vllm.pace import OwnPace, SharedPace
from cachetune_vllm.worker import ReuseWorker

PAGE = 16


class Engines:
    """Says which tenants' engines are asked for, in order, and lets each wait until it may go on; then it fails."""

    def __init__(self) -> None:
        self.asked: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.go_on = threading.Semaphore(0)

    def __call__(self, tenant: str) -> Any:
        self.asked.put(tenant)
        assert self.go_on.acquire(timeout=30)
        raise CacheTuneError(f"the chunks of {tenant} are gone.")


@pytest.fixture
def engines() -> Iterator[Engines]:
    made = Engines()
    yield made
    made.go_on.release(9)


@pytest.fixture
def worker(engines: Engines) -> Iterator[ReuseWorker]:
    pages: Any = SimpleNamespace(worth_reading=lambda count: count > PAGE, block_size=PAGE)
    device = torch.device("cpu")
    made = ReuseWorker(engines, pages, device, ALL_HEADS, OwnPace(apart=True), ModelLock(), PromptRoom(device))
    yield made
    engines.go_on.release(9)
    made.close()


def load(name: str, first_page: int, exact: int = 0) -> Load:
    """Of four pages; the first tokens up to `exact` are read from them, if they are more than a page, the others written."""
    prompt = prompt_of_ids(range(4 * PAGE), [IdSpan(exact, 4 * PAGE - 1, name)])
    pages = tuple(range(first_page, first_page + 4))
    return Load(name, prompt, "frequency", 0.15, name, pages, exact, 4 * PAGE - 1, exact)


def test_a_prompt_that_reads_pages_is_begun_behind_the_step_that_fills_them(
    engines: Engines, worker: ReuseWorker
) -> None:
    worker.start(ToWorkers((load("reads", 10, exact=2 * PAGE), load("writes", 20, exact=PAGE)), idle=True))
    assert engines.asked.get(timeout=30) == "writes"  # although it came behind the other one
    engines.go_on.release()
    assert done(worker, "writes") == {"writes"}
    assert engines.asked.get(timeout=30) == "reads"


def test_pages_are_handed_over_when_a_prompt_is_done_and_not_before(engines: Engines, worker: ReuseWorker) -> None:
    worker.start(ToWorkers((load("reads", 10, exact=2 * PAGE), load("writes", 20)), idle=True))
    assert engines.asked.get(timeout=30) == "writes"
    for idle in (False, True):  # steps of vLLM meanwhile
        assert worker.finished(idle) == set()
        assert worker.failed_blocks() == set()
        assert worker.report() is None
        worker.start(ToWorkers(idle=idle))
    engines.go_on.release()
    assert done(worker, "writes") == {"writes"}
    assert worker.failed_blocks() == {20, 21, 22, 23}
    engines.go_on.release()
    assert done(worker, "reads") == {"reads"}
    assert worker.failed_blocks() == {12, 13}  # not those that it has only read


@pytest.mark.parametrize("idle", [True, False])
def test_a_step_without_anything_to_compute_lasts_until_a_prompt_had_its_turns(
    idle: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where vLLM computes in its steps, a prompt has one turn in each."""
    monkeypatch.setattr(worker_module, "IDLE_WAIT", 30)
    heads, pages, device = HeadsInTurns(), SimpleNamespace(block_size=PAGE), torch.device("cpu")
    pages.worth_reading = lambda count: False

    def engine(tenant: str) -> Any:
        for _ in range(2):  # a look and the recompute
            with heads.computing():
                pass
        raise CacheTuneError(f"the chunks of {tenant} are gone.")

    pace = SharedPace(heads, None)
    made = ReuseWorker(engine, pages, device, heads, pace, ModelLock(), PromptRoom(device))  # type: ignore[arg-type]
    made.start(ToWorkers((load("a", 10),), idle=idle))
    said = []
    for _ in range(1 if idle else 3):
        with pace.changed:
            assert pace.changed.wait_for(lambda: pace.waits or len(said) == 2, timeout=30)
        if len(said) == 2:
            assert made.finished(idle=True) == {"a"}  # it waits for the end
        else:
            said.append(made.finished(idle))
    assert said == ([{"a"}] if idle else [set(), set()])
    made.close()


@pytest.mark.parametrize(
    ("error", "left"),
    [
        (NoRoomError("there is no room."), "memory"),
        (PeerError("another worker failed: there is no room.", again=False, kind="NoRoomError"), "memory"),
        (PeerError("another worker failed: the disk is gone.", again=False, kind="OSError"), "failed"),
        (torch.OutOfMemoryError("CUDA out of memory"), "memory"),
        (ConfigError("nothing is calibrated."), "bound"),
        (GivenUpError("r"), "given up"),
        (ValueError("no"), "failed"),
    ],
    ids=repr,
)
def test_what_a_response_says_after_an_error(error: Exception, left: str) -> None:
    said = left_after(error, "r")
    assert (said["reused"], said["left"]) == (0, left)
    assert ("why" in said) == (left in ("memory", "bound"))


def done(worker: ReuseWorker, name: str) -> set[str]:
    """What the step says in which this request is done."""
    until = time.monotonic() + 30
    while name not in (said := worker.finished(idle=True)):
        assert not said
        assert time.monotonic() < until, f"{name} is never done"
    return said
