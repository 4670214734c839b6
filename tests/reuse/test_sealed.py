"""Prompts from a store with a key, and from an encrypted one: what is computed is the same as from a store without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from shared_places import Place
from tiny import llama, tokenizer

from cachetune_rag import CacheTune, Document

CHUNKS = [
    "The lighthouse was built in 1871 by three brothers.",
    "Visitors climb 214 steps; the last forty are a ladder.",
]
ASKED: dict[str, Any] = {"query": "How many steps?", "chunks": CHUNKS[::-1], "ratio": 0.3}
KEYED = {"key": {"store_key": b"k" * 32}, "encrypted": {"store_key": b"k" * 32, "encrypt": True}}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("seal", KEYED)
@pytest.mark.parametrize("selector", ["frequency", "expected_error"])
def test_prompts_are_those_of_a_plain_store_from_every_tier(
    tmp_path: Path, folder: Place, device: str, seal: str, selector: str
) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    model, found = llama().to(device), {}
    for name, options in {"plain": {}, seal: KEYED[seal]}.items():
        path, place = tmp_path / name, f"{folder.url}/{name}"
        with CacheTune(model, tokenizer(), path, remote=place, **options) as engine:
            engine.precompute([Document("a", CHUNKS)])
            engine.store.sync()
        wanted = {"disk": (path, {"host_budget": 0, "remote": place}), "remote": (place, {"host_budget": 0})}
        for tier, (store, more) in (wanted | {"host": (path, {"remote": place})}).items():
            with CacheTune(model, tokenizer(), store, **more, **options) as engine:
                for _ in range(1 + (tier == "host")):  # the first request brings them there
                    state = engine.prefill(**ASKED, selector=selector)
                found[name, tier] = state.logits.float().cpu()
                assert state.report.missed == 0
                assert set(state.report.bytes_read) == {tier}
                if device == "cuda":
                    reader = engine.store.open(engine.runtime.assembler.key(engine.prompts.encode(CHUNKS[0])))
                    assert reader is not None
                    with reader:
                        assert reader.read(0, 4).is_pinned()
        stored = b"".join(file.read_bytes() for file in path.rglob("*.safetensors"))
        assert (b"lighthouse" in stored) is (name != "encrypted")
    for tier in ("disk", "remote", "host"):
        assert float((found[seal, tier] - found["plain", tier]).abs().max()) <= 1e-5, tier
