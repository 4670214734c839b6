"""The engine on a CUDA device gives what it gives on a CPU."""

from __future__ import annotations

import contextlib
import copy
import gc
import random
import threading
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, Family, random_ids
from tiny import llama, tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from cachetune_rag import CacheTune, Document, ModelChangedError
from cachetune_rag.concurrency.deadline import DeadlinePool
from cachetune_rag.model import KVBuffers, ModelAdapter
from cachetune_rag.model import adapter as adapter_module
from cachetune_rag.model.cuda import device_forward, steps
from cachetune_rag.model.cuda.graphs import Exchange
from cachetune_rag.model.heads import Heads
from cachetune_rag.reuse import device_loader
from cachetune_rag.reuse.device_loader import DeviceLoader
from cachetune_rag.reuse.source import Source
from cachetune_rag.reuse.state import PrefillState
from cachetune_rag.reuse.streams import Streams
from cachetune_rag.runtime import Runtime
from cachetune_rag.selection import get_selector
from cachetune_store import LayerSpec, pinning
from cachetune_store.buffers import SlabPool, private_pages

pytestmark = pytest.mark.gpu

WAYS = pytest.mark.parametrize("cuda_kernels", [False, True], ids=["plain", "kernels"])
CHUNKS = [
    "The lighthouse was built in 1871 by three brothers.",
    "Visitors climb 214 steps; the last forty are a ladder.",
]
QUERY = "How many steps?"


@pytest.fixture(autouse=True)
def _exact() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


LEADS = [[1, 40, 41, 42, 43], [1, 70, 71], [1, 90, 12, 13]]
"""Lead-ins of chunks whose KV is a mean, so that the default selector knows their deviations."""


@WAYS
@pytest.mark.parametrize(
    "selector",
    [
        "frequency",
        "probe",
        "expected_error",
        "expected_error_early",
        "expected_error_tokens",
        "chunk_head",
        "none",
        "all",
    ],
)
@pytest.mark.parametrize("codec", ["exact", "int8", "fp8", "int4"])
def test_cuda_equals_cpu(tmp_path: Path, selector: str, codec: str, cuda_kernels: bool) -> None:
    logits = {}
    for device in ("cpu", "cuda"):
        lead_in = LEADS if selector.startswith("expected_error") else "first_token"
        options = {"codec": codec, "batch_tokens": 0, "cuda_kernels": cuda_kernels, "lead_in": lead_in}
        with CacheTune(llama().to(device), tokenizer(), tmp_path / device, **options) as engine:
            engine.precompute([Document("a", CHUNKS)])
            state = engine.prefill(query=QUERY, chunks=CHUNKS[::-1], ratio=0.3, selector=selector)
            logits[device] = state.logits.cpu()
            assert state.report.missed == 0
    # Codecs round at borders that float32 noise can cross; a step of fp8 and int4 is a large one.
    allowed = {"exact": 1e-4, "int8": 0.05, "fp8": 0.2, "int4": 0.2}[codec]
    assert float((logits["cpu"] - logits["cuda"]).abs().max()) <= allowed


def test_a_store_made_on_a_gpu_serves_a_cpu_and_back(tmp_path: Path) -> None:
    with CacheTune(llama().cuda(), tokenizer(), tmp_path) as engine:
        engine.precompute([Document("a", CHUNKS)])
    with CacheTune(llama(), tokenizer(), tmp_path) as engine:
        assert engine.prefill(query=QUERY, chunks=CHUNKS).report.missed == 0


def test_host_memory_is_pinned(tmp_path: Path) -> None:
    with CacheTune(llama().cuda(), tokenizer(), None) as engine:
        engine.precompute([Document("a", CHUNKS)])
        key = engine.runtime.assembler.key(engine.prompts.encode(CHUNKS[0]))
        with engine.store.open(key) as reader:
            assert reader.read(0, 4).is_pinned()


@WAYS
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_every_family_recomputes_to_its_full_prefill(family: Family, cuda_kernels: bool) -> None:
    adapter = ModelAdapter(family.build().cuda(), cuda_kernels=cuda_kernels)
    ids = torch.tensor(random_ids(70, seed=1), device="cuda")
    full, _ = adapter.full_forward(ids)
    buffers = adapter.new_buffers(70)
    for rows in (*buffers.key_rows, *buffers.value_rows):
        rows.fill_(float("nan"))
    ours = adapter.selective_forward(ids, torch.arange(70, device="cuda"), buffers)
    assert float((ours - full).abs().max()) <= 5e-5


@WAYS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch_tokens", [0, 8192])
def test_half_types_recompute_to_full_prefill(dtype: torch.dtype, batch_tokens: int, cuda_kernels: bool) -> None:
    options = {"batch_tokens": batch_tokens, "cuda_kernels": cuda_kernels}
    with CacheTune(llama().to("cuda", dtype), tokenizer(), None, **options) as engine:
        engine.precompute([Document("a", CHUNKS)])
        full = engine.full_prefill(query=QUERY, chunks=CHUNKS)
        ours = engine.prefill(query=QUERY, chunks=CHUNKS, ratio=0.99, selector="probe")
        assert float((ours.logits - full.logits).abs().max()) <= 0.5
        engine.generate(query=QUERY, chunks=CHUNKS, max_new_tokens=5, do_sample=True, seed=1)


@WAYS
def test_answers_are_those_of_a_cpu(tmp_path: Path, cuda_kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With more tokens than there are rows for at first; of chunks that are stored and of some that are not."""
    monkeypatch.setattr(steps, "ANSWER_ROWS", 16)
    monkeypatch.setattr(adapter_module, "ANSWER_ROWS", 16)
    answers = {}
    for device in ("cpu", "cuda"):
        with CacheTune(llama().to(device), tokenizer(), tmp_path / device, cuda_kernels=cuda_kernels) as engine:
            engine.precompute([Document("a", CHUNKS)])
            for _ in range(2):  # launched, then captured
                found = [
                    engine.generate(query=QUERY, chunks=chunks, max_new_tokens=50, min_new_tokens=50, ratio=0.3)
                    for chunks in (CHUNKS, ["A chunk that nobody has seen before."])
                ]
                answers[device] = [answer.token_ids for answer in found]
                assert found[0].report.reused
                assert len(found[0].token_ids) == 50
    assert answers["cpu"] == answers["cuda"]


@WAYS
def test_a_prompt_is_read_again_where_the_model_is_not_sure(
    cuda_kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the first token, and in the middle of the answer; the first reading's memory is free by then."""
    way = {
        "query": QUERY,
        "chunks": CHUNKS,
        "selector": "none",
        "ratio": 0.0,
        "max_new_tokens": 24,
        "min_new_tokens": 24,
    }
    made: list[weakref.ref[KVBuffers]] = []
    there: list[bool] = []
    with CacheTune(llama().cuda(), tokenizer(), None, cuda_kernels=cuda_kernels, lead_in="first_token") as engine:
        engine.precompute([Document("a", CHUNKS)])
        assembler, device = engine.runtime.assembler, engine.adapter.device
        prefill, full_prefill = assembler.prefill, assembler.full_prefill
        whole, plain = (engine.generate(**way, reuse=reuse).token_ids for reuse in (False, True))
        assert plain != whole

        def first(*arguments: Any) -> Any:
            state = prefill(*arguments)
            made.append(weakref.ref(state.buffers))
            return state

        def second(*arguments: Any) -> Any:
            there.append(made[-1]() is not None)
            return full_prefill(*arguments)

        monkeypatch.setattr(assembler, "prefill", first)
        monkeypatch.setattr(assembler, "full_prefill", second)
        gc.disable()
        try:
            found = [engine.generate(**way, min_sure=share / 50) for share in range(51)]
        finally:
            gc.enable()
        assert not any(there)
        assert next(each.report.read_again for each in found if each.token_ids == plain) is None
        assert found[-1].token_ids == whole
        places = [0 if each.report.read_again is None else each.report.read_again.token for each in found]
        answer = found[places.index(max(places))]
        assert max(places) > 0
        said = answer.token_ids[: max(places)]
        assert said == plain[: max(places)]
        ids = torch.tensor([*engine.prompts.build(query=QUERY, chunks=CHUNKS).ids, *said], device=device)
        logits, cache = engine.adapter.full_forward(ids)
        for token in answer.token_ids[max(places) :]:
            logits[:, 2] = -torch.inf  # the end token, which `min_new_tokens` rules out
            assert token == int(logits.argmax())
            logits = engine.adapter.forward(torch.tensor([token], device=device), cache)


def test_graphs_give_what_launching_gives(tmp_path: Path) -> None:
    with CacheTune(llama().cuda(), tokenizer(), tmp_path, batch_tokens=0, lead_in=LEADS) as engine:
        engine.precompute([Document("a", CHUNKS)])
        forward = engine.adapter.device_forward
        assert forward is not None

        def logits(selector: str, ratio: float, query: str = QUERY) -> torch.Tensor:
            return engine.prefill(query=query, chunks=CHUNKS, ratio=ratio, selector=selector).logits

        forward.graphs_enabled = False
        selectors = ("frequency", "probe", "expected_error", "expected_error_early", "random")
        wanted = {(s, r): logits(s, r) for s in selectors for r in (0.0, 0.2, 0.6, 0.9)}
        forward.graphs_enabled = True
        for _ in range(3):
            for (selector, ratio), expected in wanted.items():
                assert float((logits(selector, ratio) - expected).abs().max()) <= 1e-5, (selector, ratio)
        assert forward.graphs_enabled, "the tiny model was not captured"
        assert forward.captures
        # Compiled layers round otherwise, within float32.
        engine.warmup(256, [2048])
        for (selector, ratio), expected in wanted.items():
            for _ in range(3):
                assert float((logits(selector, ratio) - expected).abs().max()) <= 1e-4, (selector, ratio)


def test_the_first_forward_of_a_size_below_the_largest_is_captured() -> None:
    adapter, length, tokens = ModelAdapter(llama().cuda()), 700, 400
    forward, ids, places = adapter.device_forward, torch.tensor(random_ids(length, seed=1)), torch.arange(length)
    assert forward is not None

    def logits() -> torch.Tensor:
        buffers = adapter.new_buffers(length)
        for rows in (*buffers.key_rows, *buffers.value_rows):
            rows.zero_()
        return adapter.selective_forward(ids[-tokens:], places[-tokens:], buffers)

    forward.graphs_enabled = False
    wanted = logits()
    forward.graphs_enabled = True
    forward.drop_graphs()
    forward.warmup(64, largest=600)
    captures = forward.captures
    assert captures == 3, "the largest size, the smallest, and a decoding step"
    for _ in range(3):
        assert float((logits() - wanted).abs().max()) <= 1e-5
        assert forward.captures == captures + 1
    assert forward.graphs_enabled


@WAYS
@pytest.mark.parametrize("codec", ["exact", "int8", "int4"])
@pytest.mark.parametrize("disk", [False, True], ids=["host", "disk"])
def test_a_shortlist_gives_on_cuda_what_it_gives_on_a_cpu(
    tmp_path: Path, codec: str, cuda_kernels: bool, disk: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default selector looks at all rows in 2 of 8 layers, and at half of them, which are copied first, in the others."""
    monkeypatch.setattr(get_selector("expected_error"), "least", 1)
    texts = [f"{text} {number}, and {number * number}" for number in range(12) for text in CHUNKS]
    allowed = {"exact": 1e-4, "int8": 0.05, "int4": 0.2}[codec]
    found: dict[str, list[torch.Tensor]] = {}
    for device in ("cpu", "cuda"):
        options = {"codec": codec, "batch_tokens": 0, "cuda_kernels": cuda_kernels, "lead_in": LEADS}
        if disk:
            options["host_budget"] = 0
        with CacheTune(llama(layers=8).to(device), tokenizer(), tmp_path / device, **options) as engine:
            engine.precompute([Document("a", texts)])
            found[device] = []
            randoms = random.Random(0)
            for number in range(12):
                chunks = randoms.sample(texts, 20)
                # The second query has more tokens than are watched, the third prompt a chunk that isn't stored.
                query = QUERY if number % 3 else "q" * 90
                if number % 4 == 2:
                    chunks[3] = f"Nobody has stored this one, number {number}."
                ratio = (0.02, 0.1, 0.25, 0.4)[number % 4]
                state = engine.prefill(query=query, chunks=chunks, ratio=ratio)
                assert state.report.selector == "expected_error"
                found[device].append(state.logits.cpu())
    scale = max(float(each.abs().max()) for each in found["cpu"])
    for number, (ours, wanted) in enumerate(zip(found["cuda"], found["cpu"], strict=True)):
        assert float((ours - wanted).abs().max()) <= allowed * scale, number


def test_a_shortlist_by_graphs_gives_what_launching_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over hundreds of requests of many lengths, with rows that would be garbage if a copy came late: the memory of buffers is poisoned."""
    monkeypatch.setattr(get_selector("expected_error"), "least", 1)
    texts = [f"{text} {number}, and {number * number} " * 4 for number in range(8) for text in CHUNKS]
    made = KVBuffers.__init__

    def poisoned(self: KVBuffers, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        if self.device.type == "cuda":
            for rows in (*self.key_rows, *self.value_rows):
                rows.fill_(float("nan"))

    monkeypatch.setattr(KVBuffers, "__init__", poisoned)
    with CacheTune(llama(layers=8).cuda(), tokenizer(), tmp_path, batch_tokens=0, lead_in=LEADS) as engine:
        engine.precompute([Document("a", texts)])
        forward = engine.adapter.device_forward
        assert forward is not None
        randoms = random.Random(0)
        asks = [(randoms.sample(texts, randoms.randint(2, 7)), randoms.choice([0.02, 0.1, 0.2])) for _ in range(20)]
        forward.graphs_enabled = False
        wanted = [engine.prefill(query=QUERY, chunks=chunks, ratio=ratio).logits for chunks, ratio in asks]
        assert all(bool(torch.isfinite(each).all()) for each in wanted)
        forward.graphs_enabled = True
        for _ in range(10):
            for (chunks, ratio), expected in zip(asks, wanted, strict=True):
                logits = engine.prefill(query=QUERY, chunks=chunks, ratio=ratio).logits
                assert float((logits - expected).abs().max()) <= 1e-4
        assert forward.captures


def test_graphs_are_captured_while_host_memory_comes_and_goes() -> None:
    """Waiting for the device, which page-locked memory takes, would end a capture, whatever thread it is done on."""
    adapter = ModelAdapter(llama().cuda())
    forward = adapter.device_forward
    assert forward is not None
    done, failed = threading.Event(), list[BaseException]()

    def churn() -> None:
        pool = SlabPool(pinned=True, limit=0)
        try:
            while not done.is_set():
                pool.allocate(1 << 20)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=churn) for _ in range(8)]
    [thread.start() for thread in threads]
    try:
        with torch.no_grad():
            for _ in range(5):
                forward.drop_graphs()
                forward.warmup(512)
    finally:
        done.set()
        [thread.join() for thread in threads]
    assert not failed
    assert forward.graphs_enabled
    assert forward.captures == 5 * 9
    torch.zeros(1, device="cuda").sum().item()


def test_a_capture_that_another_thread_ends_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = ModelAdapter(llama().cuda())
    forward = adapter.device_forward
    assert forward is not None
    ids, places = torch.arange(70), torch.arange(70)
    wanted = adapter.selective_forward(ids, places, adapter.new_buffers(70))
    real = forward.run_model

    def disturbed(*args: Any) -> torch.Tensor:
        waiting = threading.Thread(target=torch.cuda.synchronize)
        waiting.start()
        waiting.join()
        return real(*args)

    monkeypatch.setattr(forward, "run_model", disturbed)
    assert torch.equal(adapter.selective_forward(ids, places, adapter.new_buffers(70)), wanted)
    assert forward.graphs_enabled
    assert not forward.captures
    # Torch's allocator knows that the capture is over: what two streams have used comes back.
    before = torch.cuda.memory_reserved()
    stream = torch.cuda.Stream()
    for _ in range(40):
        used = torch.empty(8 << 20, device="cuda", dtype=torch.uint8)
        used.record_stream(stream)
        del used
        torch.cuda.synchronize()
    assert torch.cuda.memory_reserved() - before < 100 << 20
    monkeypatch.setattr(forward, "run_model", real)
    for _ in range(2):
        assert float((adapter.selective_forward(ids, places, adapter.new_buffers(70)) - wanted).abs().max()) <= 1e-5
    assert forward.captures == 1


def test_memory_that_cannot_be_locked_leaves_no_error_behind() -> None:
    area = private_pages(1 << 20)
    assert pinning.pin(area)
    assert not pinning.pin(area)  # it is already
    torch.zeros(1, device="cuda").sum().item()
    pinning.unpin(area)
    torch.zeros(1, device="cuda").sum().item()


def test_nothing_is_captured_or_compiled_in_steady_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the warm-up, 20 requests of many lengths, ratios and orders, some with passages that aren't stored."""
    import triton
    from torch._dynamo.utils import counters

    compiled: list[str] = []
    texts = [f"{text} {number}" for number in range(6) for text in CHUNKS]
    with CacheTune(llama().cuda(), tokenizer(), tmp_path, batch_tokens=0, lead_in=LEADS) as engine:
        engine.precompute([Document("a", texts)])
        engine.warmup(768, [2048])
        forward = engine.adapter.device_forward
        assert forward is not None
        assert forward.graphs_enabled
        captures, graphs = forward.captures, counters["stats"]["unique_graphs"]
        hook = lambda *_args, **given: compiled.append(given["repr"])  # noqa: E731
        monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", hook)
        randoms = random.Random(0)
        for number in range(20):
            chunks = randoms.sample(texts, randoms.randint(1, len(texts)))
            query = "q" * randoms.randint(1, 90)
            prompt = engine.prompts.build(query=query, chunks=chunks)
            if number % 3 == 0 and len(chunks) > 4:
                prompt = replace(prompt, spans=(*prompt.spans[:1], *prompt.spans[2:]))
            report = engine.prefill(prompt=prompt, ratio=randoms.choice([0.02, 0.05, 0.15, 0.3])).report
            assert report.missed == 0
            assert report.computed <= 768, number
            assert set(report.timings) == {"lookup", "select", "load", "compute", "launch"}
            assert all(0 <= seconds <= report.ttft for seconds in report.timings.values())
            engine.generate(query=query, chunks=chunks, max_new_tokens=3, min_new_tokens=3, ratio=0.05)
        assert forward.captures == captures
        assert counters["stats"]["unique_graphs"] == graphs
        assert not compiled


@pytest.mark.parametrize("most", [0, 8192], ids=["launched", "graphs"])
def test_a_request_lets_go_of_its_memory_without_the_collector(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    made: list[weakref.ref[KVBuffers]] = []
    init = KVBuffers.__init__

    def noted(self: KVBuffers, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        made.append(weakref.ref(self))

    with CacheTune(llama().cuda(), tokenizer(), None, batch_tokens=0, lead_in=LEADS) as engine:
        engine.precompute([Document("a", CHUNKS)])
        engine.warmup(256, [2048])
        monkeypatch.setattr(device_forward, "MAX_TOKENS", most)
        monkeypatch.setattr(KVBuffers, "__init__", noted)
        gc.collect()
        gc.disable()
        try:
            for selector in ("frequency", "probe", "expected_error"):
                engine.prefill(query=QUERY, chunks=CHUNKS, ratio=0.3, selector=selector)
            engine.runtime.assembler.forget()  # the beginning that is kept for prompts to come
            assert len(made) >= 3
            assert all(buffers() is None for buffers in made)
        finally:
            gc.enable()


def test_other_values_of_a_weight_are_noticed_within_some_requests() -> None:
    model = llama().cuda()
    with CacheTune(model, tokenizer(), None, batch_tokens=0) as engine:
        for _ in range(12):
            engine.prefill(query=QUERY, chunks=CHUNKS)
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight.data *= 1.1

        def ask() -> None:
            for _ in range(12):
                engine.prefill(query=QUERY, chunks=CHUNKS)

        with pytest.raises(ModelChangedError, match=r"v_proj.* has other values"):
            ask()
        assert engine.model_changed()
        engine.prefill(query=QUERY, chunks=CHUNKS)


def test_a_state_keeps_its_cache_while_later_requests_run(tmp_path: Path) -> None:
    with CacheTune(llama().cuda(), tokenizer(), tmp_path, batch_tokens=0) as engine:
        engine.precompute([Document("a", CHUNKS)])
        engine.warmup(512, [2048])
        first = engine.prefill(query=QUERY, chunks=CHUNKS, ratio=0.3)
        kept = [layer.keys.clone() for layer in first.cache.layers], first.logits.clone()
        for ratio in (0.1, 0.5):
            engine.prefill(query=QUERY, chunks=CHUNKS[::-1], ratio=ratio)
        assert all(torch.equal(a, b.keys) for a, b in zip(kept[0], first.cache.layers, strict=True))
        assert torch.equal(kept[1], first.logits)


def test_codecs_and_tiers_together(tmp_path: Path) -> None:
    """Chunks of two codecs in one prompt, from disk and from host memory, give what a CPU gives."""
    found = {}
    for device in ("cpu", "cuda"):
        for codec, chunk in (("exact", CHUNKS[0]), ("int8", CHUNKS[1])):
            with CacheTune(llama().to(device), tokenizer(), tmp_path / device, codec=codec, batch_tokens=0) as engine:
                engine.precompute([Document(codec, [chunk])])
        with CacheTune(llama().to(device), tokenizer(), tmp_path / device, batch_tokens=0) as engine:
            for _ in range(2):  # from disk, then from host memory
                found[device] = engine.prefill(query=QUERY, chunks=CHUNKS, ratio=0.2, selector="frequency")
                assert found[device].report.missed == 0
                assert float((found["cpu"].logits - found[device].logits.cpu()).abs().max()) <= 0.05


@WAYS
@pytest.mark.parametrize("codec", ["exact", "int4"])
def test_the_device_tier_gives_what_host_memory_gives(tmp_path: Path, codec: str, cuda_kernels: bool) -> None:
    options = {"codec": codec, "batch_tokens": 0, "cuda_kernels": cuda_kernels, "device_budget": "64MiB"}
    with CacheTune(llama().cuda(), tokenizer(), tmp_path, **options) as engine:
        engine.precompute([Document("a", CHUNKS)])
        found = []
        for _ in range(4):
            for selector in ("frequency", "probe"):
                state = engine.prefill(query=QUERY, chunks=CHUNKS, ratio=0.3, selector=selector)
                found.append((selector, list(state.report.bytes_read), state.logits))
        assert [tiers for _, tiers, _ in found] == [["host"]] + [["device"]] * 7
        for selector, _, logits in found:
            wanted = next(other for name, _, other in found if name == selector)
            assert float((logits - wanted).abs().max()) <= 1e-4
        assert engine.stats().store.device.bytes <= 64 << 20


@WAYS
def test_chunks_come_and_go_on_the_device_under_load(cuda_kernels: bool) -> None:
    """A budget of half the chunks: each request evicts what the one before has just read."""
    texts = [f"{text} It is entry {number} of the register." for number in range(6) for text in CHUNKS]
    options = {"batch_tokens": 0, "cuda_kernels": cuda_kernels}
    with CacheTune(llama(layers=6).cuda(), tokenizer(), None, **options) as plain:
        plain.precompute([Document("a", texts)])
        budget = plain.stats().store.host.bytes // 2
        with CacheTune(plain.adapter.model, tokenizer(), None, device_budget=budget, **options) as engine:
            engine.precompute([Document("a", texts)])
            tiers = set()
            for turn in range(60):
                chunks = [texts[(5 * turn + i * (turn % 3 + 1)) % len(texts)] for i in range(4)]
                request = {"query": QUERY, "chunks": chunks, "ratio": 0.2, "selector": ("probe", "frequency")[turn % 2]}
                wanted, state = plain.prefill(**request), engine.prefill(**request)
                tiers |= set(state.report.bytes_read)
                assert float((state.logits - wanted.logits).abs().max()) <= 1e-4, turn
                device = engine.stats().store.device
                assert device.bytes <= budget
            assert tiers == {"host", "device"}
            assert device.evictions > 10


def test_experts_run_without_graphs() -> None:
    family = next(f for f in FAMILIES if "mixtral" in f.name)
    adapter = ModelAdapter(family.build().cuda())
    ids = torch.tensor(random_ids(70, seed=1), device="cuda")
    full, _ = adapter.full_forward(ids)
    for _ in range(3):
        buffers = adapter.new_buffers(70)
        ours = adapter.selective_forward(ids, torch.arange(70, device="cuda"), buffers)
        assert float((ours - full).abs().max()) <= 5e-5


def test_a_warm_up_without_graphs_overwrites_nothing_that_is_yet_to_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device lags behind, so that what its forwards read is still in page-locked memory while the next ones are prepared."""
    seen: list[torch.Tensor] = []

    class Noted(device_forward.Inputs):
        def __init__(self, *args: Any):
            super().__init__(*args)
            seen.append(self.positions)

    forward = ModelAdapter(llama().cuda()).device_forward
    assert forward is not None
    forward.warmup(64)  # compiles the kernel that reads
    monkeypatch.setattr(device_forward, "Inputs", Noted)
    monkeypatch.setattr(forward, "graphs_enabled", False)
    monkeypatch.setattr(forward, "run_model", lambda *_: torch.zeros(1, 1, device="cuda"))
    forward.drop_graphs()
    torch.cuda._sleep(500_000_000)
    forward.warmup(2048)
    assert len(seen) > 20
    assert all(bool((positions == -1).all()) for positions in seen)


class Share(Heads):
    """Some neighbouring heads of a model."""

    shared = True

    def __init__(self, heads: slice):
        self._heads = heads

    def own(self, spec: LayerSpec) -> slice:
        return self._heads


@pytest.mark.parametrize("by_kernel", [True, False], ids=["kernels", "plain"])
@pytest.mark.parametrize("codec", ["exact", "int8", "fp8", "int4"])
@pytest.mark.parametrize("disk", [False, True], ids=["host", "disk"])
def test_a_share_of_the_heads_comes_as_with_all_heads(
    tmp_path: Path, codec: str, disk: bool, by_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process with some of the heads copies their bytes alone, and has what a copy of whole rows gives of them; rows that are seen first, and
    all others."""
    if not by_kernel:  # rows are decoded by the codec
        monkeypatch.setattr(device_loader, "kernels_run_on", lambda _device: False)
    texts = [f"{text} {number}, and {number * number}. " * 5 for number in range(4) for text in CHUNKS]
    config = LlamaConfig(
        vocab_size=261, hidden_size=128, intermediate_size=64, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=8, head_dim=64, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval().to("cuda", torch.bfloat16)
    options: dict[str, Any] = {"host_budget": 0} if disk else {}
    with CacheTune(model, tokenizer(), tmp_path, codec=codec, **options) as engine:
        engine.precompute([Document("a", texts)])
        whole, ids = engine.adapter, [engine.prompts.encode(text) for text in texts]
        length = 3 + sum(len(each) + 2 for each in ids)
        seen = (torch.rand(length) < 0.4).cuda()
        for heads in (None, slice(0, 4), slice(4, 8), slice(6, 8)):
            adapter, start, sources = copy.copy(whole), 3, []
            if heads is not None:
                adapter.heads = Share(heads)
                adapter.layers = tuple(
                    LayerSpec(heads.stop - heads.start, spec.head_dim, spec.v_head_dim) for spec in whole.layers
                )
            for each in ids:
                reader = engine.store.open(engine.runtime.assembler.key(each))
                assert reader is not None
                sources.append(Source(reader, start, len(each)))
                start += len(each) + 2
            buffers = adapter.new_buffers(length)
            for rows in (*buffers.key_rows, *buffers.value_rows):
                rows.zero_()
            with contextlib.closing(DeadlinePool(None)) as pool:
                loader = DeviceLoader(adapter, sources, buffers, pool, Streams(adapter.device, adapter.num_layers))
                loader.expect_narrowing(2)
                loader.start()
                for layer in range(adapter.num_layers):
                    if layer == 2:
                        loader.narrow(seen)
                    loader.load_seen(layer)
                for layer in range(adapter.num_layers):
                    loader.load(layer)
                loader.close()
            torch.cuda.synchronize()
            for source in sources:
                source.reader.close()
            if heads is None:
                wanted = buffers
                continue
            pairs = ((buffers.key_rows, wanted.key_rows), (buffers.value_rows, wanted.value_rows))
            for ours, theirs in pairs:
                for mine, all_heads in zip(ours, theirs, strict=True):
                    assert mine.any()
                    assert torch.equal(mine, all_heads[:, heads])


class Exchanging(Heads):
    """A process with all heads that still exchanges what they give, as peers do: by work that no graph can capture."""

    shared = in_turns = True

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self._exchange: Exchange | None = None

    @contextlib.contextmanager
    def recorded(self, exchange: Exchange) -> Iterator[None]:
        self._exchange = exchange
        yield
        self._exchange = None

    def total(self, numbers: torch.Tensor) -> torch.Tensor:
        if self._exchange is not None:
            return self._exchange(self.total, numbers, numbers.shape)
        self.shapes.append(tuple(numbers.shape))
        return numbers * float(bool(torch.isfinite(numbers).any()))  # waits for the device


class Summed(torch.nn.Linear):
    heads: Exchanging

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.heads.total(super().forward(input))


def test_graphs_are_cut_where_peers_exchange_what_they_have(tmp_path: Path) -> None:
    """Answers are those without graphs, and so are number, order and size of the exchanges: peers that have no graph yet go on alike."""
    heads = Exchanging()
    with CacheTune(llama().cuda(), tokenizer(), tmp_path, lead_in=LEADS) as engine:
        engine.precompute([Document("a", CHUNKS)])
        fingerprint = engine.runtime.model.fingerprint
        wanted = engine.prefill(query=QUERY, chunks=CHUNKS, ratio=0.3, selector="frequency").logits
    model = llama().cuda()
    for layer in model.model.layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.__class__, linear.heads = Summed, heads
    engine = Runtime(model, tokenizer(), tmp_path, fingerprint=fingerprint, heads=heads, lead_in=LEADS)
    forward = engine.adapter.device_forward
    assert forward is not None

    def ask(selector: str, ratio: float) -> tuple[torch.Tensor, list[tuple[int, ...]]]:
        engine.assembler.forget()  # the beginning that is kept for prompts to come
        heads.shapes.clear()
        config = engine.admission.config(selector, ratio)
        request = engine.admission.for_prefill(QUERY, CHUNKS, None, None, {}, config=config, started=0.0)
        state = engine.executor.reuse(request, engine.assembler.memory)
        assert isinstance(state, PrefillState)
        return state.logits.clone(), list(heads.shapes)

    asks = [(selector, ratio) for selector in ("frequency", "expected_error", "probe") for ratio in (0.1, 0.3, 0.6)]
    forward.graphs_enabled = False
    expected = [ask(*each) for each in asks]
    assert all(shapes for _, shapes in expected)
    assert float((expected[1][0] - wanted).abs().max()) <= 1e-4
    forward.graphs_enabled = True
    for _ in range(4):
        for each, (logits, shapes) in zip(asks, expected, strict=True):
            found, exchanged = ask(*each)
            assert float((found - logits).abs().max()) <= 1e-5, each
            assert exchanged == shapes, each
    assert forward.graphs_enabled
    assert forward.captures
    engine.warmup(256, [2048], "frequency")  # compiled layers round otherwise, within float32
    for each, (logits, shapes) in zip(asks, expected, strict=True):
        for _ in range(3):
            found, exchanged = ask(*each)
            assert float((found - logits).abs().max()) <= 1e-4, each
            assert exchanged == shapes, each
    assert forward.graphs_enabled
    engine.close()
