"""A worker leaves prompts to vLLM that would take longer with their chunks from its disk than vLLM takes for them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cachetune_rag import CacheTune
from cachetune_rag.selection.base import budget
from cachetune_vllm.measured import TRIED
from cachetune_vllm.metrics import ReuseStats
from tests import tiny
from tests.vllm.saturated import TEXTS, Saturated

PLAIN = 0.05


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with CacheTune(tiny.llama(), tiny.tokenizer(), tmp_path) as engine:
        engine.precompute(TEXTS)
    return tmp_path


@pytest.fixture
def made(folder: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Saturated]:
    """With nothing in memory, and a disk that has given so many bytes a second lately; with room in host memory or without."""
    speed, room = request.param
    with CacheTune(tiny.llama(), tiny.tokenizer(), folder, host_budget=room) as engine:
        monkeypatch.setattr(engine.store, "read_speed", lambda tier: speed)
        made = Saturated(engine, monkeypatch)
        with closing(made.worker):
            yield made


def asked(
    made: Saturated, number: int, plain: float | None = PLAIN, selector: str = "frequency", ratio: float = 0.15
) -> dict[str, Any]:
    """What the response of a prompt says that vLLM would read in this time."""
    return made.ask([replace(made.load(number, selector), plain=plain, ratio=ratio)])[f"r{number}"]


def seconds_to_read(made: Saturated, number: int, speed: float) -> float:
    """In which the disk gives all rows of a prompt's chunks."""
    total = 0
    for key in map(made.engine.runtime.assembler.key, made.load(number, "frequency").prompt.chunk_ids):
        reader = made.engine.store.open(key)
        assert reader is not None
        with reader:
            total += sum(form.size(reader.layout.tokens) for form in reader.head.plan.rows)
    return total / speed


@pytest.mark.parametrize("made", [(1000.0, "1GiB")], indirect=True)
def test_a_prompt_is_left_and_the_next_one_finds_its_chunks_in_memory(made: Saturated) -> None:
    said = asked(made, 0)
    assert (said["left"], said["reused"], said["missed"], said["left_on_disk"]) == ("slow disk", 0, 0, 0)
    assert said["why"].endswith(
        "0 ms of that behind the reading; vLLM takes 50 ms for the prompt, by what this server took lately"
    )
    assert made.worker.failed_blocks() == set(made.load(0, "frequency").blocks)  # vLLM computes them
    until = time.monotonic() + 30
    while made.engine.store.stats().host.chunks < 4:
        assert time.monotonic() < until
        time.sleep(0.001)
    said = asked(made, 0)
    assert "left" not in said
    assert said["reused"]
    assert set(said["bytes_read"]) == {"host"}


@pytest.mark.parametrize("made", [(1000.0, 0)], indirect=True)
def test_chunks_that_were_open_before_are_not_opened_to_leave_a_prompt(
    made: Saturated, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM waits for that."""
    first, opened = asked(made, 0), list[Any]()
    for name in ("open", "open_in_memory"):
        monkeypatch.setattr(made.engine.store, name, lambda key, **given: opened.append(key))
    again = asked(made, 0)
    assert (again["left"], again["why"], again["left_on_disk"]) == ("slow disk", first["why"], 4)
    assert made.worker.failed_blocks() == set(made.load(0, "frequency").blocks)
    assert not opened


@pytest.mark.parametrize("made", [(1e-3, "1GiB")], indirect=True)
def test_its_chunks_are_not_read_while_vllm_computes_it(made: Saturated) -> None:
    assert asked(made, 0, plain=1e6)["left"] == "slow disk"
    coming, until = made.engine.runtime.prefetcher, time.monotonic() + 30
    while len(coming.coming) < 4:
        assert time.monotonic() < until
        time.sleep(0.001)
    for reader in coming.take(coming.coming).values():
        with reader:
            assert not reader.bytes_read


@pytest.mark.parametrize("made", [(1000.0, 0)], indirect=True)
def test_every_so_many_are_tried_and_nobody_is_left_whose_vllm_was_not_measured(made: Saturated) -> None:
    said = [asked(made, number) for number in range(TRIED)]
    assert [each.get("left") for each in said] == ["slow disk"] * (TRIED - 1) + [None]
    stats = ReuseStats()
    for each in said[:-1]:
        assert each["left_on_disk"] == 4  # nothing has room in memory
        stats.add_left(each["left"], each)
    assert stats.data["left_on_disk"] == 4 * (TRIED - 1)
    assert asked(made, 0, plain=None)["reused"]
    assert asked(made, 1, plain=1e6)["reused"]  # vLLM is slower still


@pytest.mark.parametrize("made", [(None, 0), (1e12, 0)], indirect=True, ids=["not measured", "quick"])
def test_a_disk_that_is_quick_or_was_not_measured_is_read(made: Saturated) -> None:
    for number in range(3):
        said = asked(made, number)
        assert said["reused"]
        assert said["bytes_read"]["disk"]


@pytest.mark.parametrize("made", [(1000.0, 0)], indirect=True)
def test_a_selector_that_looks_at_rows_computes_behind_the_reading(made: Saturated) -> None:
    """What was measured speaks for a selector that doesn't, at the same disk and for the same prompt."""
    reading, load = seconds_to_read(made, 0, 1000.0), made.load(0, "frequency")
    plain = 1.2 * reading
    said = asked(made, 0, plain, "expected_error", 0.3)
    first = load.prompt.spans[0].start  # these tokens are computed meanwhile
    stored = sum(span.end - span.start for span in load.prompt.spans)
    tokens = load.end - load.start + 1
    computing = plain * (tokens - stored + budget(0.3, stored)) / tokens
    behind = computing - plain * first / tokens
    assert (said["left"], said["reused"]) == ("slow disk", 0)
    assert f"{1000 * behind:.0f} ms of that behind the reading;" in said["why"]
    assert f"its chunks take {1000 * reading:.0f} ms to be read from disk" in said["why"]
    assert f"its other tokens {1000 * computing:.0f} ms to be computed, " in said["why"]
    assert asked(made, 0, plain, "frequency", 0.3)["reused"]
    # With so much time, all of it may be done one behind the other.
    assert asked(made, 0, 4 * reading, "expected_error", 0.3)["reused"]
