"""The engine on a CUDA device gives what it gives on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import FAMILIES, Family, random_ids
from tiny import llama, tokenizer

from cachetune_rag import CacheTune, Document
from cachetune_rag.model import ModelAdapter

pytestmark = pytest.mark.gpu

CHUNKS = [
    "The lighthouse was built in 1871 by three brothers.",
    "Visitors climb 214 steps; the last forty are a ladder.",
]
QUERY = "How many steps?"


@pytest.fixture(autouse=True)
def _exact() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


@pytest.mark.parametrize("selector", ["frequency", "probe", "chunk_head", "none", "all"])
@pytest.mark.parametrize("codec", ["exact", "int8"])
def test_cuda_equals_cpu(tmp_path: Path, selector: str, codec: str) -> None:
    logits = {}
    for device in ("cpu", "cuda"):
        with CacheTune(llama().to(device), tokenizer(), tmp_path / device, codec=codec, batch_tokens=0) as engine:
            engine.precompute([Document("a", CHUNKS)])
            state = engine.prefill(query=QUERY, chunks=CHUNKS[::-1], ratio=0.3, selector=selector)
            logits[device] = state.logits.cpu()
            assert state.report.missed == 0
    # int8 rounds at borders that float32 noise can cross
    assert float((logits["cpu"] - logits["cuda"]).abs().max()) <= (1e-4 if codec == "exact" else 0.05)


def test_a_store_made_on_a_gpu_serves_a_cpu_and_back(tmp_path: Path) -> None:
    with CacheTune(llama().cuda(), tokenizer(), tmp_path) as engine:
        engine.precompute([Document("a", CHUNKS)])
    with CacheTune(llama(), tokenizer(), tmp_path) as engine:
        assert engine.prefill(query=QUERY, chunks=CHUNKS).report.missed == 0


def test_host_memory_is_pinned(tmp_path: Path) -> None:
    with CacheTune(llama().cuda(), tokenizer(), None) as engine:
        engine.precompute([Document("a", CHUNKS)])
        key = engine._assembler.key(engine.prompts.encode(CHUNKS[0]))
        with engine.store.open(key) as reader:
            assert reader.read(0, 4).is_pinned()


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_every_family_recomputes_to_its_full_prefill(family: Family) -> None:
    adapter = ModelAdapter(family.build().cuda())
    ids = torch.tensor(random_ids(70, seed=1), device="cuda")
    full, _ = adapter.full_forward(ids)
    buffers = adapter.new_buffers(70)
    for rows in (*buffers.key_rows, *buffers.value_rows):
        rows.fill_(float("nan"))
    ours = adapter.selective_forward(ids, torch.arange(70, device="cuda"), buffers)
    assert float((ours - full).abs().max()) <= 5e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch_tokens", [0, 8192])
def test_half_types_recompute_to_full_prefill(dtype: torch.dtype, batch_tokens: int) -> None:
    with CacheTune(llama().to("cuda", dtype), tokenizer(), None, batch_tokens=batch_tokens) as engine:
        engine.precompute([Document("a", CHUNKS)])
        full = engine.full_prefill(query=QUERY, chunks=CHUNKS)
        ours = engine.prefill(query=QUERY, chunks=CHUNKS, ratio=0.99, selector="probe")
        assert float((ours.logits - full.logits).abs().max()) <= 0.5
        engine.generate(query=QUERY, chunks=CHUNKS, max_new_tokens=5, do_sample=True, seed=1)
