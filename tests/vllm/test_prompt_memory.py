"""What memory a saturated worker has for prompts: never more than two at once, perhaps one over the other, and none while it waits, whatever became of them.

The engine is real, and on a CPU; vLLM's layers are stood in for. The next prompt is begun as on a GPU, when all of the one at hand is queued.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch

from cachetune_rag import CacheTune
from cachetune_vllm.failures import DEVICE_FULL
from tests import tiny
from tests.vllm.saturated import PAGES, TEXTS, Saturated


@pytest.fixture(scope="module")
def engine() -> Iterator[CacheTune]:
    with CacheTune(tiny.llama(), tiny.tokenizer()) as engine:
        engine.precompute(TEXTS)
        yield engine


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
