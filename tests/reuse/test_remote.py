"""Answers from chunks that another machine has stored, and without them when the shared place fails."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from shared_places import Place
from tiny import llama, tokenizer

from cachetune_rag import CacheTune, Document
from cachetune_store.remote import breaker

CHUNKS = [
    "The lighthouse was built in 1871 by three brothers from the next valley.",
    "Its lamp burned whale oil until 1902, when paraffin reached the island.",
]
ASK = {"query": "Who built it?", "chunks": CHUNKS, "ratio": 0.2, "selector": "frequency"}
TOKENS = sum(map(len, CHUNKS))


@contextmanager
def engine(place: Place, folder: Path | None = None, **options: object) -> Iterator[CacheTune]:
    """An engine on a machine of its own."""
    given = {"remote_options": place.options, "remote_timeout": place.timeout} | options
    where = {"store": place.url} if folder is None else {"store": folder, "remote": place.url}
    with CacheTune(llama(), tokenizer(), **where, **given) as made:
        yield made


def precompute(place: Place, **options: object) -> torch.Tensor:
    """Store the chunks from another machine. Gives the logits there."""
    with engine(place, **options) as made:
        made.precompute(Document("a", CHUNKS))
        return made.prefill(**ASK).logits


@pytest.fixture(scope="module")
def alone() -> torch.Tensor:
    """Logits of an engine that has nothing stored."""
    with CacheTune(llama(), tokenizer()) as made:
        return made.prefill(**ASK).logits


@pytest.mark.parametrize("directory", [True, False])
def test_what_one_machine_has_stored_answers_on_another(place: Place, tmp_path: Path, directory: bool) -> None:
    there = precompute(place)
    with engine(place, tmp_path / "kv" if directory else None) as made:
        state = made.prefill(**ASK)
        assert (state.report.missed, state.report.unreadable) == (0, 0)
        assert set(state.report.bytes_read) == {"remote"}
        assert torch.equal(state.logits, there)
        assert [info.id for info in made.store.documents()] == ["a"]


def test_a_machine_recognises_what_another_has_stored(folder: Place, tmp_path: Path) -> None:
    precompute(folder)
    with engine(folder, tmp_path / "kv") as made:
        text = f"Read this:\n{CHUNKS[1]}\n\n{CHUNKS[0]}\nWho built it?"
        report = made.prefill(prompt=made.prompt_from_text(text), ratio=0.2, selector="frequency").report
        assert report.missed == 0
        assert report.reused + report.recomputed == TOKENS


def test_machines_agree_on_lead_ins(folder: Place, tmp_path: Path) -> None:
    texts = [f"Text {number}: " + "the keeper wrote into his book what he had seen. " * 12 for number in range(4)]
    with engine(folder, tmp_path / "one") as made:
        made.precompute(Document("a", texts))
        namespace = made.namespace
        assert len(namespace.lead_ins) > 1
        made.store.sync()
    with engine(folder, tmp_path / "two") as made:
        other = ["Others: " + "there was no ship in sight that could have taken him along. " * 12]
        made.precompute(Document("b", other))
        assert made.namespace == namespace
        assert made.prefill(query="What?", chunks=texts[:2], ratio=0.1).report.missed == 0


def test_an_unseen_removal_is_no_wrong_answer(folder: Place, alone: torch.Tensor) -> None:
    precompute(folder)
    with engine(folder) as made, engine(folder) as other:
        other.store.delete_document("a")
        state = made.prefill(**ASK)
        assert float((state.logits - alone).abs().max()) <= 1e-5 or state.report.missed == 0


@pytest.mark.parametrize("fault", ["stall", "reset"])
@pytest.mark.parametrize("begun", [False, True])
def test_a_place_that_fails_is_answered_without(
    network: Place, alone: torch.Tensor, fault: str, begun: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(breaker, "_FIRST", 60.0)
    precompute(network)
    with engine(network) as made:
        if begun:  # once the heads are there
            _fail_after(made, network, fault, len(CHUNKS), monkeypatch)
        else:
            network.proxy.fault = fault
            network.proxy.cut()
        state = made.prefill(**ASK)
        report = state.report
        assert report.missed == TOKENS
        assert report.unreadable + report.timed_out == 2
        assert float((state.logits - alone).abs().max()) <= 1e-5
        assert made.store.stats().remote.failed > 0
        assert made.store.stats().damaged == 0
        network.proxy.fault = ""


def _fail_after(made: CacheTune, place: Place, fault: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the place fail once so many chunks were opened."""
    real, lock, opened = made.store.open, threading.Lock(), []

    def opening(*given: object, **options: object) -> object:
        reader = real(*given, **options)
        with lock:
            opened.append(reader)
            if len(opened) == count:
                place.proxy.fault = fault
                place.proxy.cut()
        return reader

    monkeypatch.setattr(made.store, "open", opening)


def test_chunks_are_computed_in_the_codec_of_the_place(folder: Place, tmp_path: Path) -> None:
    precompute(folder, remote_codec="int4")
    with engine(folder, tmp_path / "kv") as made:
        report = made.prefill(**ASK).report
        assert report.missed == 0
        with made.store.open(made.store.documents()[0].chunks[0]) as reader:
            assert reader.layout.codec == "int4"
            assert report.bytes_read["remote"] == 2 * reader.head.plan.total
