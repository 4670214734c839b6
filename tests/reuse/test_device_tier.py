"""The engine over a store with a device tier (in the CPU's memory here: what moves, not how fast)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import llama, tokenizer

from cachetune_rag import CacheTune, ConfigError, Document
from cachetune_store import ChunkStore

CHUNKS = [
    "The lighthouse was built in 1871 by three brothers from the next valley, who quarried the stone themselves.",
    "Its lamp burned whale oil until 1902, when paraffin reached the island.",
    "Visitors climb 214 steps; the last forty are a ladder.",
]
QUERY = "How many steps are there?"


def ask(engine: CacheTune, selector: str = "probe") -> tuple[torch.Tensor, dict[str, int]]:
    state = engine.prefill(query=QUERY, chunks=CHUNKS, ratio=0.2, selector=selector)
    assert state.report.missed == 0
    return state.logits, state.report.bytes_read


@pytest.mark.parametrize("selector", ["probe", "frequency"])
@pytest.mark.parametrize("codec", ["exact", "int4"])
def test_answers_are_the_same_from_every_tier(tmp_path: Path, codec: str, selector: str) -> None:
    with CacheTune(llama(), tokenizer(), tmp_path, codec=codec) as engine:
        engine.precompute([Document("a", CHUNKS)])
        wanted, from_host = ask(engine, selector)
    store = ChunkStore(tmp_path, codec=codec, device="cpu", device_budget="64MiB")
    with store, CacheTune(llama(), tokenizer(), store) as engine:
        for tier in ("disk", "host", "device", "device"):
            logits, read = ask(engine, selector)
            assert float((logits - wanted).abs().max()) <= 1e-5
            assert list(read) == [tier]
            assert read[tier] >= from_host["host"]
        stats = engine.stats().store
        assert (stats.device.chunks, stats.device.hits, stats.device.promotions) == (3, 6, 3)
        assert stats.device.bytes_read == 2 * from_host["host"]


def test_a_budget_below_the_prompt_serves_the_rest_from_host_memory(tmp_path: Path) -> None:
    with ChunkStore(None) as store, CacheTune(llama(), tokenizer(), store) as engine:
        engine.precompute([Document("a", CHUNKS)])
        wanted, _ = ask(engine)
        budget = 2 * store.stats().host.bytes // 3
    with (
        ChunkStore(None, device="cpu", device_budget=budget) as store,
        CacheTune(llama(), tokenizer(), store) as engine,
    ):
        engine.precompute([Document("a", CHUNKS)])
        for _ in range(3):
            logits, read = ask(engine)
            assert float((logits - wanted).abs().max()) <= 1e-5
            assert store.stats().device.bytes <= budget
        assert set(read) == {"device", "host"}
        assert store.stats().device.evictions == 0


def test_a_removed_document_leaves_the_device_too() -> None:
    with (
        ChunkStore(None, device="cpu", device_budget="64MiB") as store,
        CacheTune(llama(), tokenizer(), store) as engine,
    ):
        engine.precompute([Document("a", CHUNKS)])
        ask(engine)
        assert store.stats().device.chunks == 3
        engine.remove("a")
        assert store.stats().device.bytes == 0
        assert engine.prefill(query=QUERY, chunks=CHUNKS).report.missed > 0


def test_a_device_tier_without_a_device_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"device_budget is '4GiB'.*set host_budget"):
        CacheTune(llama(), tokenizer(), tmp_path, device_budget="4GiB")
    with CacheTune(llama(), tokenizer(), tmp_path, device_budget=0) as engine:
        assert engine.stats().store.device is None
