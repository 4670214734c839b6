"""Deviations of chunks on disk: read by those requests alone whose selector asks for them, and found damaged or missing by them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from faulty_disk import Fault, faulty_disk
from tiny import llama, tokenizer

from cachetune_rag import CacheTune, Document

CHUNKS = [
    "The lighthouse was built in 1871 by three brothers from the next valley.",
    "Its lamp burned whale oil until 1902, when paraffin reached the island.",
]
LEADS = [[1, *tokenizer()(text).input_ids] for text in ("Of lamps", "and stairs, many", "a winter's log")]
ASK: dict[str, Any] = {"query": "Who built it?", "chunks": CHUNKS, "ratio": 0.2}


def fresh(path: Path | None, **options: Any) -> CacheTune:
    return CacheTune(llama(), tokenizer(), path, **{"lead_in": LEADS, "host_budget": 0} | options)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[CacheTune]:
    """A store with both chunks, none of them in host memory."""
    with fresh(tmp_path, read_timeout=0.5) as made:
        made.precompute(Document("a", CHUNKS))
        yield made


@pytest.fixture(scope="module")
def wanted() -> dict[str, torch.Tensor]:
    """Logits by selector, of an engine whose chunks are in memory."""
    found = {}
    with fresh(None, host_budget="1GiB") as made:
        made.precompute(Document("a", CHUNKS))
        for selector in ("frequency", "expected_error"):
            found[selector] = made.prefill(**ASK, selector=selector).logits
    return found


def deviations_at(store: Path) -> dict[Path, tuple[int, int]]:
    """Where the deviations begin and end in each chunk file."""
    places = {}
    for file in store.glob("chunks/*/*"):
        content = file.read_bytes()
        length = int.from_bytes(content[:8], "little")
        begin, end = json.loads(content[8 : 8 + length])["deviations"]["data_offsets"]
        places[file] = 8 + length + begin, 8 + length + end
    return places


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return float((a - b).abs().max()) <= 1e-5


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("selector", ["frequency", "expected_error"])
def test_they_are_read_once_and_only_if_the_selector_uses_them(
    tmp_path: Path, engine: CacheTune, wanted: dict[str, torch.Tensor], selector: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (begin,) = {begin for begin, _ in deviations_at(tmp_path).values()}
    reads: list[int] = []
    real = os.preadv

    def preadv(fd: int, areas: list[memoryview], position: int) -> int:
        reads.append(position)
        return real(fd, areas, position)

    monkeypatch.setattr(os, "preadv", preadv)
    state = engine.prefill(**ASK, selector=selector)
    assert state.report.missed == 0
    assert same(state.logits, wanted[selector])
    first = len(reads)
    layers = engine.adapter.num_layers
    per_chunk = 1 + layers + (selector == "expected_error")
    assert first == len(CHUNKS) * per_chunk, "a head, the layers, and the deviations where they are wanted"
    assert reads.count(begin) == len(CHUNKS) * (selector == "expected_error")
    assert same(engine.prefill(**ASK, selector=selector).logits, wanted[selector])
    assert len(reads) - first == len(CHUNKS) * (per_chunk - 1), "the heads are known now"


def test_damaged_ones_cost_their_chunk_and_nothing_else(
    tmp_path: Path, engine: CacheTune, wanted: dict[str, torch.Tensor]
) -> None:
    file, (begin, _) = sorted(deviations_at(tmp_path).items())[0]
    flip(file, begin)
    state = engine.prefill(**ASK, selector="frequency")
    assert state.report.damaged == 0, "nobody has asked for them"
    assert same(state.logits, wanted["frequency"])
    state = engine.prefill(**ASK, selector="expected_error")
    assert (state.report.damaged, state.report.unstored) == (1, 0)
    assert state.report.missed in [len(chunk) for chunk in CHUNKS]
    engine.flush()
    state = engine.prefill(**ASK, selector="expected_error")
    assert (state.report.damaged, state.report.missed) == (0, 0), "it was computed and stored again"
    assert same(state.logits, wanted["expected_error"])


def test_an_explanation_that_meets_damaged_ones_begins_anew(tmp_path: Path, engine: CacheTune) -> None:
    file, (begin, _) = sorted(deviations_at(tmp_path).items())[0]
    flip(file, begin)
    found = engine.explain(ASK["query"], CHUNKS, ratio=0.2, selector="frequency", max_new_tokens=1)
    assert sorted(chunk.outcome for chunk in found.chunks) == ["damaged", "stored"]


def test_those_that_do_not_arrive_are_done_without(tmp_path: Path, engine: CacheTune) -> None:
    engine.prefill(**ASK, selector="frequency")  # the heads are known, so that deviations are what is read first
    with faulty_disk(tmp_path / "chunks", Fault("stuck", ("preadv",))) as fault:
        report = engine.prefill(**ASK, selector="expected_error").report
        assert fault.met
        assert (report.timed_out, report.missed) == (2, sum(map(len, CHUNKS)))
    until = time.monotonic() + 30
    while engine.runtime.pool.overdue:
        assert time.monotonic() < until
        time.sleep(0.01)
    assert engine.prefill(**ASK, selector="expected_error").report.missed == 0
    assert engine.store.stats().disk.pinned == 0


def test_a_request_does_not_wait_for_the_deviations_of_a_chunk_that_was_read(tmp_path: Path, engine: CacheTune) -> None:
    """The disk falls silent when one chunk is complete but for its deviations, which nobody wants, and the other isn't."""
    engine.close()
    for after in range(2 * engine.adapter.num_layers):
        with fresh(tmp_path, read_timeout=0.3, host_budget="1GiB") as made:
            with faulty_disk(tmp_path / "chunks", Fault("stuck", ("preadv",), after=2 + after)) as fault:
                done: list[Any] = []
                request = Thread(target=lambda: done.append(made.prefill(**ASK, selector="none")))  # noqa: B023
                request.start()
                request.join(20)
                assert done, f"it waits for ever after {after} reads of rows"
                assert fault.met
                assert done[0].report.timed_out > 0
            request.join()
            until = time.monotonic() + 30
            while made.runtime.pool.overdue:
                assert time.monotonic() < until
                time.sleep(0.01)
