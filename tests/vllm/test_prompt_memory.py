"""What memory a saturated worker has for prompts: never more than two at once, perhaps one over the other, and none while it waits, whatever became of them.

The engine is real, and on a CPU; vLLM's layers are stood in for. The next prompt is begun as on a GPU, when all of the one at hand is queued.
"""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cachetune_rag import CacheTune
from cachetune_rag.model import KVBuffers
from cachetune_rag.model.heads import ALL_HEADS
from cachetune_rag.reuse.prompt_room import PromptRoom
from cachetune_vllm.failures import DEVICE_FULL
from cachetune_vllm.messages import Load, ToWorkers
from cachetune_vllm.pace import OwnPace
from cachetune_vllm.pages import Pages
from cachetune_vllm.worker import ReuseWorker
from tests import tiny

PAGE, PAGES = 8, 1000
TEXTS = [f"Ship {n} came in at noon with {n * 7} barrels of salt, and left before the storm." for n in range(8)]


@pytest.fixture(scope="module")
def engine() -> Iterator[CacheTune]:
    with CacheTune(tiny.llama(), tiny.tokenizer()) as engine:
        engine.precompute(TEXTS)
        yield engine


class Meanwhile:
    """A prompt's memory; when the prompt is computed, the device takes a while for it, in which others are begun."""

    def __init__(self, memory: Any, meanwhile: Callable[[], None]):
        self._memory, self._meanwhile = memory, meanwhile

    def __getattr__(self, name: str) -> Any:
        return getattr(self._memory, name)

    def keep(self, *given: Any) -> None:
        for _ in range(3):
            self._meanwhile()
        self._memory.keep(*given)


class OnDevice:
    """An engine whose prompts take a while."""

    def __init__(self, runtime: Any):
        self._runtime, self.executor = runtime, self

    def __getattr__(self, name: str) -> Any:
        runtime = self._runtime
        return getattr(runtime if hasattr(runtime, name) else runtime.executor, name)

    def reuse(self, request: Any, memory: Any, wanted: Any, begun: Any, meanwhile: Any, account: Any) -> Any:
        given = Meanwhile(memory, meanwhile)
        return self._runtime.executor.reuse(request, given, wanted, begun, meanwhile, account)


class Saturated:
    """A worker with many prompts.

    Attributes:
        room: the memory of prompts.
        alive: numbers of the buffers that are there.
        most: the most of these at once, and of the prompts that had memory.
        begun: how many prompts got their buffers beside another one.
        full: a layer of this page has no memory.
    """

    def __init__(self, engine: CacheTune, patch: pytest.MonkeyPatch, most: int | None = None, readable: bool = True):
        self.engine, self.room = engine, PromptRoom(torch.device("cpu"), most)
        self.alive: set[int] = set()
        self.most, self.begun, self.full = (0, 0), 0, -1
        layers: Any = [
            SimpleNamespace(
                impl=SimpleNamespace(do_kv_cache_update=self._write),
                kv_cache=torch.zeros(PAGES, spec.heads, PAGE, spec.head_dim + spec.v_head_dim),
            )
            for spec in engine.adapter.layers
        ]
        pages = Pages(layers, PAGE, PAGES)
        assert pages.learn_to_read(engine.adapter.new_buffers(PAGE))
        pages.readable = readable
        self._layers = layers
        made: Any = OnDevice(engine.runtime)
        self.worker = ReuseWorker(
            lambda tenant: made, pages, torch.device("cpu"), ALL_HEADS, OwnPace(apart=True), engine.runtime.model.lock, self.room
        )  # fmt: skip
        make, count = KVBuffers.__init__, iter(range(1000))

        def note(buffers: KVBuffers, *args: Any, **kwargs: Any) -> None:
            make(buffers, *args, **kwargs)
            self.alive.add(number := next(count))
            weakref.finalize(buffers, self.alive.discard, number)
            self.most = max(self.most[0], len(self.alive)), max(self.most[1], self.room.parts)
            self.begun += len(self.alive) == 2

        patch.setattr(KVBuffers, "__init__", note)

    def _write(self, attention: Any, keys: Any, values: Any, pages: torch.Tensor, slots: torch.Tensor) -> None:
        if self.full in slots // PAGE:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 56.00 MiB.")
        pages[slots // PAGE, :, slots % PAGE] = torch.cat((keys, values), -1)

    def load(self, number: int, selector: str, first: int | None = None) -> Load:
        """A prompt of about 360 tokens."""
        chunks = random.Random(number).sample(TEXTS, 4)
        prompt = self.engine.prompts.build(query=f"How many, {number}?", chunks=chunks, prefix="The log.")
        count = -(-len(prompt.ids) // PAGE)
        start = 1 + 60 * number if first is None else first
        return Load(
            f"r{number}", prompt, selector, 0.15, "", tuple(range(start, start + count)), 0, len(prompt.ids) - 1, 0
        )

    def ask(self, loads: list[Load], given_up: frozenset[str] = frozenset()) -> dict[str, dict[str, Any]]:
        """All reports, once all are done."""
        done: set[str] = set()
        reports: dict[str, dict[str, Any]] = {}
        gc.disable()
        try:
            self.worker.start(ToWorkers(tuple(loads), idle=True))
            self.worker.start(ToWorkers(given_up=given_up, idle=True))
            while len(done) < len(loads):
                done |= self.worker.finished(idle=True)
            told = self.worker.report()
            assert told is not None
            reports.update(told.reports)
            assert (self.alive, self.room.parts) == (set(), 0)  # although Python's collector did not run
        finally:
            gc.enable()
        return reports

    def written(self, load: Load) -> list[torch.Tensor]:
        """The rows of a prompt in the pages, layer by layer."""
        return [layer.kv_cache[list(load.blocks)].clone() for layer in self._layers]


@pytest.fixture(params=[800, 400], ids=["room for two", "room for one"])
def saturated(
    engine: CacheTune, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[Saturated]:
    made = Saturated(engine, monkeypatch, engine.adapter.buffer_bytes(request.param))
    with closing(made.worker):
        yield made


def test_a_saturated_worker_takes_memory_for_two_where_it_may(
    engine: CacheTune, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Saturated(engine, monkeypatch, engine.adapter.buffer_bytes(800))
    with closing(made.worker):
        made.ask([made.load(number, "frequency") for number in range(12)])
    assert made.room.size >= 2 * engine.adapter.buffer_bytes(350)


@pytest.mark.parametrize("selector", ["expected_error", "frequency"])
def test_two_prompts_at_most_have_memory_and_none_while_the_worker_waits(saturated: Saturated, selector: str) -> None:
    loads = [saturated.load(number, selector) for number in range(12)]
    said = saturated.ask(loads)
    assert all(report["reused"] > 0 for report in said.values())
    assert saturated.most == (2, 2)
    assert saturated.begun >= 10  # all but the first one, and perhaps the second, for which the memory had to grow
    together = [saturated.written(load) for load in loads]
    for load, found in zip(loads, together, strict=True):  # and one after another, their rows are the same
        saturated.ask([load])
        assert all(map(torch.equal, saturated.written(load), found))


def test_nothing_stays_of_prompts_that_fail_or_are_given_up(
    saturated: Saturated, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = [saturated.load(number, "frequency", PAGES if number in (3, 6) else None) for number in range(10)]
    saturated.full = loads[8].blocks[2]
    said = saturated.ask(loads, frozenset({"r4", "r5"}))
    assert {name: report.get("left") for name, report in said.items() if name not in ("r4", "r5")} == {
        f"r{number}": "failed" if number in (3, 6) else "memory" if number == 8 else None
        for number in (0, 1, 2, 3, 6, 7, 8, 9)
    }
    assert said["r8"]["why"] == DEVICE_FULL
    assert saturated.most == (2, 2)
    assert saturated.worker.failed_blocks() >= set(loads[8].blocks)  # vLLM computes them


def test_a_prompt_for_which_there_is_no_room_is_left_to_vllm_and_says_so(
    engine: CacheTune, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        size = engine.adapter.buffer_bytes(400)
        for most, reused in ((size // 2, False), (size, True)):
            made = Saturated(engine, patch, most)
            with closing(made.worker):
                said = made.ask([made.load(number, "expected_error") for number in range(4)])
            assert made.room.size <= most
            assert made.most == ((2, 2) if reused else (0, 0))  # the next one gets the memory of the one at hand
            for report in said.values():
                assert (report.get("left"), report["reused"] > 0) == (None if reused else "memory", reused)
                assert reused or "and prompts may take" in report["why"]


@pytest.mark.parametrize("selector", ["expected_error", "frequency"])
def test_a_prompt_that_starts_over_without_damaged_chunks_has_one_part_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, selector: str
) -> None:
    with CacheTune(tiny.llama(), tiny.tokenizer(), tmp_path, host_budget=0) as engine:
        engine.precompute(TEXTS)
        for file in sorted(tmp_path.rglob("*.safetensors"))[:3]:
            content = bytearray(file.read_bytes())
            content[len(content) // 2 :: 97] = bytes(255 - byte for byte in content[len(content) // 2 :: 97])
            file.write_bytes(content)
        made = Saturated(engine, monkeypatch, engine.adapter.buffer_bytes(800))
        with closing(made.worker):
            said = made.ask([made.load(number, selector) for number in range(6)])
        assert sum(report["damaged"] for report in said.values() if "damaged" in report) > 0
        assert any(report["reused"] for report in said.values())
        assert made.most[1] == 1  # rows on disk are not brought before their turn


def test_where_pages_cant_be_read_the_next_prompt_waits_for_memory(
    engine: CacheTune, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The beginning of a prompt is kept then, and copied from its buffers when all is done."""
    monkeypatch.setattr(engine.runtime.assembler.memory, "keep", lambda *given: None)
    made = Saturated(engine, monkeypatch, engine.adapter.buffer_bytes(400), readable=False)
    with closing(made.worker):
        said = made.ask([made.load(number, "frequency") for number in range(4)])
    assert all(report["reused"] > 0 for report in said.values())
    assert made.most == (1, 1)
