"""All keys of a request come from one reading of the store's lead-ins, whatever another process chooses meanwhile."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import llama, tokenizer

from cachetune_rag import CacheTune
from cachetune_rag.chunks import lead_ins as lead_ins_module
from cachetune_rag.reuse.lookup import ChunkLookup
from cachetune_store import ChunkKey, ChunkStore, Namespace, make_key


def prose(tokens: int, seed: int) -> str:
    rng = random.Random(seed)
    return "".join(rng.choice("abcdefghijklmnopqrst      ") for _ in range(tokens - 1)) + "."


CHUNKS = [prose(48, seed) for seed in range(32)]
CORPUS = [prose(200, 100 + seed) for seed in range(8)]


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[CacheTune]:
    with CacheTune(llama(max_positions=4096), tokenizer(), tmp_path / "kv", host_budget=0) as engine:
        yield engine


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every reading of a note, of any store."""
    told: list[str] = []
    read = ChunkStore.note

    def note(self: ChunkStore, name: str, **options: Any) -> bytes | None:
        told.append(name)
        return read(self, name, **options)

    monkeypatch.setattr(ChunkStore, "note", note)
    return told


def test_a_request_of_many_chunks_reads_the_lead_ins_once(engine: CacheTune, reads: list[str]) -> None:
    engine.precompute(CHUNKS[:8])  # too little text to choose from: nothing is settled, so each request has to look
    for ratio in (0.2, "auto"):
        reads.clear()
        engine.generate("Who?", CHUNKS[:8], ratio=ratio, max_new_tokens=1)
        assert len(reads) == 1


def test_reading_ahead_reads_the_lead_ins_once(engine: CacheTune, tmp_path: Path, reads: list[str]) -> None:
    engine.precompute(CHUNKS[:8])
    with CacheTune(llama(max_positions=4096), tokenizer(), tmp_path / "kv") as other:
        reads.clear()
        other.prefetch(CHUNKS[:8]).wait()
        assert len(reads) == 1


def test_missed_chunks_are_stored_behind_one_more_reading(engine: CacheTune, reads: list[str]) -> None:
    assert engine.prefill("Who?", CHUNKS[:8], ratio="auto").report.missed
    assert len(reads) == 2


def test_once_chosen_they_are_read_at_most_once_a_second(engine: CacheTune, reads: list[str]) -> None:
    engine.precompute(CORPUS)
    assert len(engine.namespace.lead_ins) > 1
    reads.clear()
    for _ in range(5):
        engine.prefill("Who?", CORPUS[:4], ratio="auto")
    assert len(reads) <= 1


def test_a_choice_in_the_midst_of_a_request_mixes_no_keys(
    engine: CacheTune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process chooses lead-ins between the request's coming and its look at the store, and again before the report."""
    engine.precompute(CHUNKS[:8])
    before = engine.namespace
    monkeypatch.setattr(lead_ins_module, "RECENT_SECONDS", 0.0)
    looked: list[ChunkKey] = []
    look_up, open_ = ChunkLookup.find, ChunkStore.open

    def choosing(self: ChunkLookup, prompt: Any, namespace: Namespace, *rest: Any) -> Any:
        with CacheTune(llama(max_positions=4096), tokenizer(), tmp_path / "kv", host_budget=0) as other:
            other.precompute(CORPUS)
        return look_up(self, prompt, namespace, *rest)

    def opened(self: ChunkStore, key: ChunkKey, **options: Any) -> Any:
        looked.append(key)
        return open_(self, key, **options)

    monkeypatch.setattr(ChunkLookup, "find", choosing)
    monkeypatch.setattr(ChunkStore, "open", opened)
    prompt = engine.prompts.build(query="Who?", chunks=CHUNKS[:8])
    report = engine.generate(prompt=prompt, ratio="auto", max_new_tokens=1).report
    assert engine.namespace != before, "the other process did choose"
    assert set(looked) == {make_key(before, ids) for ids in prompt.chunk_ids}
    assert (report.missed, report.reused + report.recomputed) == (0, sum(map(len, prompt.chunk_ids)))
