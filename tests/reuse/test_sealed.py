"""Prompts from a store with a key, and from an encrypted one: what is computed is the same as from a store without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
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
@pytest.mark.parametrize("tier", ["disk", "host", "remote"])
def test_prompts_are_those_of_a_plain_store(
    tmp_path: Path, request: pytest.FixtureRequest, device: str, seal: str, selector: str, tier: str
) -> None:
    if seal == "encrypted":
        pytest.importorskip("cryptography")
    torch.backends.cuda.matmul.allow_tf32 = False
    model, found = llama().to(device), {}
    for name, options in {"plain": {}, seal: KEYED[seal]}.items():
        path: Path | str = tmp_path / name
        if tier == "remote":
            path = f"{request.getfixturevalue('folder').url}/{name}"
        with CacheTune(model, tokenizer(), path, **options) as engine:
            engine.precompute([Document("a", CHUNKS)])
        with CacheTune(model, tokenizer(), path, **options, **({} if tier == "host" else {"host_budget": 0})) as engine:
            for _ in range(1 + (tier == "host")):  # the first request brings them there
                state = engine.prefill(**ASKED, selector=selector)
            found[name] = state.logits.float().cpu()
            assert state.report.missed == 0
            assert set(state.report.bytes_read) == {tier}
            if device == "cuda":
                reader = engine.store.open(engine.runtime.assembler.key(engine.prompts.encode(CHUNKS[0])))
                assert reader is not None
                with reader:
                    assert reader.read(0, 4).is_pinned()
        stored = b"".join(file.read_bytes() for file in tmp_path.rglob("*.safetensors") if name in file.parts)
        assert (b"lighthouse" in stored) is (name != "encrypted")
    assert float((found[seal] - found["plain"]).abs().max()) <= 1e-5
