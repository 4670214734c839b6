"""A worker leaves prompts to vLLM whose chunks its disk gives more slowly than vLLM reads them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cachetune_rag import CacheTune
from cachetune_vllm.measured import TRIED
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


def asked(made: Saturated, number: int, plain: float | None = PLAIN) -> dict[str, Any]:
    """What the response of a prompt says that vLLM would read in this time."""
    return made.ask([replace(made.load(number, "frequency"), plain=plain)])[f"r{number}"]


@pytest.mark.parametrize("made", [(1000.0, "1GiB")], indirect=True)
def test_a_prompt_is_left_and_the_next_one_finds_its_chunks_in_memory(made: Saturated) -> None:
    said = asked(made, 0)
    assert (said["left"], said["reused"], said["missed"]) == ("slow disk", 0, 0)
    assert said["why"].endswith("to be read from disk and vLLM 50 ms for the prompt, by what this server took lately")
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
def test_every_so_many_are_tried_and_nobody_is_left_whose_vllm_was_not_measured(made: Saturated) -> None:
    left = [asked(made, number).get("left") for number in range(TRIED)]
    assert left == ["slow disk"] * (TRIED - 1) + [None]
    assert asked(made, 0, plain=None)["reused"]
    assert asked(made, 1, plain=1e6)["reused"]  # vLLM is slower still


@pytest.mark.parametrize("made", [(None, 0), (1e12, 0)], indirect=True, ids=["not measured", "quick"])
def test_a_disk_that_is_quick_or_was_not_measured_is_read(made: Saturated) -> None:
    for number in range(3):
        said = asked(made, number)
        assert said["reused"]
        assert said["bytes_read"]["disk"]
