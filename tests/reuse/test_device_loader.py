"""The loader for GPUs, over streams that do everything at once: what is queued, in which order, and for which layer.

Whether streams really run side by side is for the card (tests/test_gpu.py); what the loader asks of them is seen here.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import itertools
import math
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import plain_kernels
import pytest
import torch
from tiny import llama, tokenizer

from cachetune_rag import CacheTune, Document
from cachetune_rag.concurrency.deadline import DeadlinePool
from cachetune_rag.model import KVBuffers, ModelAdapter
from cachetune_rag.model.heads import Heads
from cachetune_rag.model.opened_model import open_model
from cachetune_rag.reuse import device_loader as device_module
from cachetune_rag.reuse import host_copies, row_kernels, staging
from cachetune_rag.reuse.device_loader import DeviceLoader
from cachetune_rag.reuse.host_copies import HostCopies, Strip
from cachetune_rag.reuse.layer_loader import LayerLoader
from cachetune_rag.reuse.plan import Loaders
from cachetune_rag.reuse.source import Source
from cachetune_rag.reuse.streams import Streams
from cachetune_store import ChunkStore, LayerSpec, get_codec
from cachetune_store.chunk import Chunk

TEXTS = [
    "The lighthouse was built in 1871.",
    "Visitors climb 214 steps, of which the last forty are a ladder, and are given a certificate at the top.",
    "The keeper's house is a museum.",
]
LENGTH = 200
STRIPS: list[tuple[int, int, int, int, int]] = []
"""What was copied by strips: device address, host address, pitch, width, rows."""
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None


class Stream:
    cuda_stream = 7

    def __init__(self, *args: Any, **kwargs: Any):
        self.waited: list[Any] = []

    def wait_event(self, event: Any) -> None:
        assert event.recorded, "waits for an event that nothing has recorded"
        self.waited.append(event)

    def wait_stream(self, stream: Any) -> None: ...


class Event:
    recorded = False

    def __init__(self, enable_timing: bool = False): ...

    def record(self, stream: Any = None) -> None:
        self.recorded = True

    def synchronize(self) -> None:
        assert self.recorded, "a wait for something that was not queued"

    def query(self) -> bool:
        return self.recorded


@pytest.fixture(autouse=True)
def _immediate(monkeypatch: pytest.MonkeyPatch) -> None:
    current = Stream()
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device=None: current)
    monkeypatch.setattr(torch.cuda, "stream", lambda _stream: nullcontext())
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    monkeypatch.setattr(staging, "STAGE_STEP", 1024)  # so that staging memory is larger than the rows in them


@pytest.fixture(
    params=[
        "exact", "int8", "int4", "exact without addresses", "exact together",
        *(
            pytest.param(f"{codec} by kernel", marks=pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter"))
            for codec in ("exact", "int4")
        ),
    ]
)  # fmt: skip
def engine(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[CacheTune]:
    codec, by_address = request.param.split()[0], "without" not in request.param
    by_kernel = "kernel" in request.param
    layers = 3 if by_kernel else 8  # the interpreter is slow
    monkeypatch.setattr(device_module, "kernels_run_on", lambda _device: by_kernel or "together" in request.param)
    if "together" in request.param:  # several layers at a time
        plain_kernels.install(monkeypatch)

    def run(copies: list[tuple[int, int, int]], stream: int) -> None:
        assert stream == Stream.cuda_stream
        for to, at, count in copies:
            ctypes.memmove(to, at, count)

    def run_strips(strips: list[tuple[int, int, int, int, int]], stream: int) -> None:
        STRIPS.extend(strips)
        for to, at, pitch, width, count in strips:
            run([(to + row * pitch, at + row * pitch, width) for row in range(count)], stream)

    STRIPS.clear()
    monkeypatch.setattr(device_module, "host_copies", lambda: HostCopies(run, run_strips) if by_address else None)
    with opened(tmp_path, llama(layers=layers), codec=codec) as made:
        made.precompute([Document("a", TEXTS)])
        assert open_model(made.adapter.model).half_split() == [True] * layers
        yield made


@contextmanager
def opened(path: Path, model: Any, **options: Any) -> Iterator[CacheTune]:
    """An engine whose store has a device tier, in the CPU's memory."""
    store = ChunkStore(path, device="cpu", device_budget="64MiB", **options)
    with store, CacheTune(model, tokenizer(), store) as made:
        made.adapter.half_split = [True] * made.adapter.num_layers
        yield made


def buffers_of(adapter: ModelAdapter, await_layer: Callable[[int], None] | None = None) -> KVBuffers:
    """Buffers in one piece of memory, as on a GPU."""
    memory = torch.empty(adapter.buffer_bytes(LENGTH), dtype=torch.uint8)
    return adapter.new_buffers(LENGTH, memory=memory, await_layer=await_layer)


def sources(engine: CacheTune, shares: list[float]) -> list[Source]:
    start, found = 5, []
    for text, share in zip(TEXTS, shares, strict=True):
        reader = engine.store.open(engine.runtime.assembler.key(engine.prompts.encode(text)))
        assert reader is not None
        found.append(Source(reader, start, int(share * reader.layout.tokens)))
        start += reader.layout.tokens + 2
    return found


@pytest.mark.parametrize("tiers", ["host", "disk", "device", "device+host", "device+disk"])
@pytest.mark.parametrize("probed", [0, 2, "started"])
def test_buffers_are_as_the_plain_loader_fills_them(
    engine: CacheTune, tiers: str, probed: int | str, tmp_path: Path
) -> None:
    if "disk" in tiers:  # another engine over the same directory, with nothing in host memory
        with opened(tmp_path, engine.adapter.model, host_budget=0) as cold:
            check(cold, probed, tiers)
    else:
        check(engine, probed, tiers)


class Awaited:
    """Another prompt may have a layer's memory until it is waited for: nothing was written to it before.

    Attributes:
        layers: the numbers of those that were waited for, each once, in the order of the first wait.
        rows: keys and values of each layer, which are zero.
    """

    def __init__(self) -> None:
        self.layers: list[int] = []
        self.rows: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(self, layer: int) -> None:
        if layer not in self.layers:
            assert not any(each.any() for each in self.rows[layer]), (
                "rows of a layer are placed before its memory is free"
            )
            self.layers.append(layer)


def check(engine: CacheTune, probed: int | str, tiers: str) -> None:
    looked = probed if isinstance(probed, int) else 0
    adapter = engine.adapter
    if "device" in tiers:
        for source in sources(engine, [1, 1, 1])[0 if tiers == "device" else 1 :]:
            with source.reader:
                source.reader.promote()
    filled = []
    # Opened beforehand: a chunk that was read from disk whole is on the device when its reader is closed.
    passes = [(plain, sources(engine, [1, 1, 1]), sources(engine, [0.5, 1, 0])) for plain in (True, False)]
    with closing(DeadlinePool(None)) as pool:
        for plain, whole, some in passes:
            buffers = buffers_of(adapter, (awaited := Awaited()))
            awaited.rows = list(zip(buffers.key_rows, buffers.value_rows, strict=True))
            for rows in (*buffers.key_rows, *buffers.value_rows):
                rows.zero_()
            assert {s.reader.tier for s in whole} == set(tiers.split("+"))
            if plain:
                loader = LayerLoader(adapter, whole, buffers, pool)
            else:
                loader = DeviceLoader(adapter, whole, buffers, pool, Streams(adapter.device, adapter.num_layers))
            if probed == "started":
                loader.start_first_layers()
            for layer in range(looked):
                loader.load(layer)
            ahead = [loader.is_loaded(layer) for layer in range(adapter.num_layers)]
            loader.set_sources(some)
            loader.start()
            for layer in range(adapter.num_layers):
                loader.load(layer)
                assert loader.is_loaded(layer)
            loader.close()
            assert awaited.layers == list(range(adapter.num_layers))
            if not plain and tiers == "device" and device_module.kernels_run_on(adapter.device):
                assert not loader.staged, "rows on the device are read where they lie"
            read = [s.reader.bytes_read for s in (*whole, *some)]
            for source in (*whole, *some):
                source.reader.close()
            filled.append((buffers, ahead, read))
    (wanted, _, plain_read), (found, ahead, read) = filled
    if not probed and "disk" not in tiers:  # nothing was begun that the change of sources made needless
        assert read == plain_read
    places = np.concatenate([s.places[: s.rows] for s in some])
    for layer in range(adapter.num_layers):
        # Layers queued before the sources changed hold more rows than are needed: those at `places` are what counts.
        at = slice(None) if not ahead[layer] or layer < looked else places
        assert torch.equal(found.key_rows[layer][at], wanted.key_rows[layer][at])
        assert torch.equal(found.value_rows[layer][at], wanted.value_rows[layer][at])


def test_engines_on_one_model_have_the_same_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that was freed on a stream is kept for that stream: a server's tenants would each have some of their own."""
    entered: list[Any] = []
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: entered.append(stream) or nullcontext())
    adapters = [ModelAdapter(llama()) for _ in range(2)]
    with closing(DeadlinePool(None)) as pool:
        for adapter in (adapters[0], adapters[0], adapters[1]):
            monkeypatch.setattr(adapter, "cuda_kernels", True)
            with Loaders(adapter, pool).beside():
                pass
    assert entered[0] is entered[1]
    assert entered[0] is not entered[2]


def narrow_behind(layers: int, loader: LayerLoader) -> None:
    """As a selector does that sees all rows in the first layers, and the prompt's first 40 alone in the next one."""
    loader.expect_narrowing(1)
    for layer in range(layers):
        loader.load(layer)
    seen = torch.zeros(LENGTH, dtype=torch.bool)
    seen[:40] = True
    loader.narrow(seen)
    loader.load_seen(layers)


@pytest.mark.parametrize("tier", ["host", "device"])
@pytest.mark.parametrize("narrowed", [False, True])
def test_a_prompts_buffers_are_freed_with_its_loader(engine: CacheTune, tier: str, narrowed: bool) -> None:
    """At once. If parts of a loader referred back to it, the device's memory would fill with prompts until Python's collector runs."""
    adapter, some = engine.adapter, sources(engine, [1, 1, 1])
    if tier == "device":
        for source in some:
            with source.reader:
                source.reader.promote()
        some = sources(engine, [1, 1, 1])
    gc.disable()
    try:
        with closing(DeadlinePool(None)) as pool:
            buffers = buffers_of(adapter)
            loader = DeviceLoader(adapter, some, buffers, pool, Streams(adapter.device, adapter.num_layers))
            loader.start_first_layers()
            if narrowed:
                narrow_behind(2, loader)
            for layer in range(adapter.num_layers):
                loader.load(layer)
            loader.close()
            for source in some:
                source.reader.close()
            held = weakref.ref(buffers)
            del buffers, loader
            assert held() is None
    finally:
        gc.enable()


def test_seen_rows_are_there_first_and_the_others_in_the_end(
    engine: CacheTune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Chunk, "page_locked", True)
    for tiers, fewer in itertools.product(("host", "disk", "device+host"), (False, True)):
        if "disk" in tiers:
            with opened(tmp_path, engine.adapter.model, host_budget=0) as cold:
                check_parts(cold, tiers, fewer)
        else:
            check_parts(engine, tiers, fewer)


def check_parts(engine: CacheTune, tiers: str, fewer: bool) -> None:
    """Both loaders, with rows narrowed before the second layer, against a loader that brings everything at once."""
    adapter, layers = engine.adapter, engine.adapter.num_layers
    if "+" in tiers:  # one of the chunks is in the faster tier
        source = sources(engine, [1, 1, 1])[1]
        with source.reader as reader:
            assert reader.promote()
    generator = torch.Generator().manual_seed(1)
    seen = torch.rand(LENGTH, generator=generator) < 0.4
    with closing(DeadlinePool(None)) as pool:
        wanted = zeroed(adapter)
        # Opened beforehand: a chunk that was read from disk whole is on the device when its reader is closed.
        given, *both = (sources(engine, [1, 1, 1]) for _ in range(3))
        whole = LayerLoader(adapter, given, wanted, pool)
        for layer in range(layers):
            whole.load(layer)
        once = [s.reader.bytes_read for s in given]
        for device, every in zip((False, True), both, strict=True):
            assert {s.reader.tier for s in every} == set(tiers.split("+"))
            buffers = zeroed(adapter)
            if device:
                loader: LayerLoader = DeviceLoader(adapter, every, buffers, pool, Streams(adapter.device, layers))
            else:
                loader = LayerLoader(adapter, every, buffers, pool)
            loader.expect_narrowing(1)
            loader.start()
            loader.load_seen(0)
            loader.narrow(seen)
            for layer in range(1, layers):
                loader.load_seen(layer)
                assert rows_equal(buffers, wanted, layer, seen)
            some = (
                [s.first(int(s.rows * share)) for s, share in zip(every, (0.5, 1, 0), strict=True)] if fewer else every
            )
            loader.set_sources(some)
            loader.start()
            at = torch.zeros(LENGTH, dtype=torch.bool)
            at[np.concatenate([s.places[: s.rows] for s in some])] = True
            for layer in range(layers):
                loader.load(layer)
                assert rows_equal(buffers, wanted, layer, at)
                assert rows_equal(buffers, wanted, layer, seen)
            loader.close()
            if tiers == "host":
                assert [s.reader.bytes_read for s in every] == once, "no row is read twice"
            for source in every:
                source.reader.close()
        whole.close()
        for source in given:
            source.reader.close()


def zeroed(adapter: ModelAdapter) -> KVBuffers:
    buffers = buffers_of(adapter)
    for rows in (*buffers.key_rows, *buffers.value_rows):
        rows.zero_()
    return buffers


def rows_equal(found: KVBuffers, wanted: KVBuffers, layer: int, at: torch.Tensor) -> bool:
    pairs = ((found.key_rows, wanted.key_rows), (found.value_rows, wanted.value_rows))
    return all(torch.equal(ours[layer][at], theirs[layer][at]) for ours, theirs in pairs)


@pytest.mark.parametrize("tier", ["host", "device"])
def test_rows_of_tokens_that_a_prompt_does_not_have_go_to_the_spare_place_alone(engine: CacheTune, tier: str) -> None:
    adapter, spare, filled, there = engine.adapter, LENGTH - 1, [], np.zeros(LENGTH, np.bool_)
    if tier == "device":
        for source in sources(engine, [1, 1, 1]):
            with source.reader:
                source.reader.promote()
    for plain in (True, False):
        some = sources(engine, [1, 1, 1])
        for source, edges in zip(some, ((2, 1), (0, 2), (1, 0)), strict=True):
            source.inside, source.spare = range(edges[0], source.reader.layout.tokens - edges[1]), spare
            there[source.start + source.inside.start : source.start + source.inside.stop] = True
        buffers = buffers_of(adapter)
        for rows in (*buffers.key_rows, *buffers.value_rows):
            rows.fill_(7)
        with closing(DeadlinePool(None)) as pool:
            loader = (
                LayerLoader(adapter, some, buffers, pool)
                if plain
                else DeviceLoader(adapter, some, buffers, pool, Streams(adapter.device, adapter.num_layers))
            )
            for layer in range(adapter.num_layers):
                loader.load(layer)
            loader.close()
        for source in some:
            assert source.reader.tier == tier
            source.reader.close()
        filled.append(buffers)
    there[spare] = False
    elsewhere = ~there
    elsewhere[spare] = False
    wanted, found = filled
    for rows, others in ((wanted.key_rows, found.key_rows), (wanted.value_rows, found.value_rows)):
        for mine, theirs in zip(rows, others, strict=True):
            assert torch.equal(mine[there], theirs[there])
            assert (mine[elsewhere] == 7).all()
            assert (theirs[elsewhere] == 7).all()
            assert not (mine[there] == 7).all(dim=(1, 2)).any()


class OneHead(Heads):
    """One of the two key-value heads of the tiny model."""

    shared = True

    def __init__(self, number: int):
        self._number = number

    def own(self, spec: LayerSpec) -> slice:
        return slice(self._number, self._number + 1)


@pytest.fixture
def narrow_strips(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Rows of the tiny model are so short that all of them would be copied whole."""
    monkeypatch.setattr(host_copies, "LEAST", 0)
    host_copies.strips_of.cache_clear()
    yield
    host_copies.strips_of.cache_clear()


@pytest.mark.parametrize(
    ("tiers", "narrowed", "number"),
    [("host", False, 0), ("host", True, 1), ("disk", False, 1), ("disk", True, 0), ("device+host", True, 0)],
)
@pytest.mark.usefixtures("narrow_strips")
def test_a_process_with_some_heads_has_their_rows_and_copies_no_others(
    engine: CacheTune, tiers: str, narrowed: bool, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Chunk, "page_locked", True)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: True)
    if "disk" in tiers:
        with opened(tmp_path, engine.adapter.model, host_budget=0) as cold:
            check_share(cold, narrowed, number)
    else:
        if "+" in tiers:
            with sources(engine, [1, 1, 1])[1].reader as reader:
                assert reader.promote()
        check_share(engine, narrowed, number)
    # The rows of a group share bytes, so they are copied whole; without addresses, torch copies.
    if engine.store.codec != "int4" and device_module.host_copies() is not None:
        rows = {width for _, _, _, width, _ in STRIPS}
        assert STRIPS
        assert max(rows) <= 32  # 8 numbers


def check_share(engine: CacheTune, narrowed: bool, number: int) -> None:
    whole = engine.adapter
    adapter = copy(whole)
    adapter.heads, adapter.layers = OneHead(number), tuple(LayerSpec(1, s.head_dim, s.v_head_dim) for s in whole.layers)
    wanted, found = zeroed(whole), zeroed(adapter)
    seen = torch.rand(LENGTH, generator=torch.Generator().manual_seed(1)) < 0.4
    given, ours = (sources(engine, [1, 1, 1]) for _ in range(2))
    with closing(DeadlinePool(None)) as pool:
        plain = LayerLoader(whole, given, wanted, pool)
        loader = DeviceLoader(adapter, ours, found, pool, Streams(adapter.device, adapter.num_layers))
        if narrowed:
            loader.expect_narrowing(1)
        loader.start()
        for layer in range(adapter.num_layers):
            plain.load(layer)
            if narrowed and layer == 1:
                loader.narrow(seen)
            if narrowed:
                loader.load_seen(layer)
                assert torch.equal(found.key_rows[layer][seen], wanted.key_rows[layer][seen, number : number + 1])
        for layer in range(adapter.num_layers):
            loader.load(layer)
            assert torch.equal(found.key_rows[layer], wanted.key_rows[layer][:, number : number + 1])
            assert torch.equal(found.value_rows[layer], wanted.value_rows[layer][:, number : number + 1])
        for each in (plain, loader):
            each.close()
    for source in (*given, *ours):
        source.reader.close()


@pytest.mark.parametrize(
    ("codec", "heads", "strips"),
    [
        # K and V are as wide, so a strip has the half of each: twice as many rows of half the pitch.
        ("exact", slice(0, 4), [Strip(0, 2048, 1024, 2)]),
        ("exact", slice(6, 8), [Strip(1536, 2048, 512, 2)]),
        # The scales in front of K are copied with it; to skip some would be a strip more.
        ("int8", slice(0, 4), [Strip(0, 2112, 576), Strip(1088, 2112, 512)]),
        # The scales of the last heads lie far from their K, and beside V of the row before.
        ("int8", slice(4, 8), [Strip(576, 2112, 512), Strip(1600, 2112, 576)]),
        ("fp8", slice(4, 8), [Strip(576, 2112, 512), Strip(1600, 2112, 576)]),
        ("int8", slice(0, 2), [Strip(0, 2112, 320), Strip(1088, 2112, 256)]),
        ("int8", slice(2, 4), [Strip(8, 2112, 568), Strip(1344, 2112, 256)]),
        ("int8", slice(4, 6), [Strip(576, 2112, 256), Strip(1600, 2112, 568)]),
        ("int8", slice(6, 8), [Strip(832, 2112, 256), Strip(1856, 2112, 320)]),
        ("exact", slice(0, 8), None),
        ("int4", slice(0, 4), None),
    ],
)
def test_rows_are_copied_by_few_wide_strips(codec: str, heads: slice, strips: list[Strip] | None) -> None:
    spec, coder = LayerSpec(8, 128, 128), get_codec(codec)
    form, wanted = coder.row_format(spec, "bfloat16"), coder.head_bytes(spec, "bfloat16", heads)
    found = host_copies.strips_of(form, wanted)
    assert found == (None if strips is None else tuple(strips))
    assert host_copies.copied_bytes(form, wanted, 64) == (
        form.size(64) if strips is None else 64 * sum(strip.width * strip.each for strip in strips)
    )


@pytest.mark.parametrize(("heads", "dim"), [(8, 32), (2, 64)], ids=["narrow", "few"])
def test_rows_of_which_strips_would_save_too_little_are_copied_whole(heads: int, dim: int) -> None:
    spec = LayerSpec(heads, dim, dim)
    for codec in ("int8", "exact"):
        coder = get_codec(codec)
        form, half = coder.row_format(spec, "bfloat16"), coder.head_bytes(spec, "bfloat16", slice(0, heads // 2))
        assert host_copies.strips_of(form, half) is None


@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize("codec", ["exact", "int8"])
@pytest.mark.parametrize("first", range(0, 8, 2))
def test_strips_bring_all_bytes_of_the_heads_and_touch_nothing_else(codec: str, first: int, rows: int) -> None:
    spec, coder = LayerSpec(8, 128, 128), get_codec(codec)
    form = coder.row_format(spec, "bfloat16")
    wanted = coder.head_bytes(spec, "bfloat16", slice(first, first + 2))
    host = torch.randint(1, 256, (form.size(rows),), dtype=torch.uint8)
    device = torch.zeros_like(host)
    at, copied = host.data_ptr(), [0]

    def run(copies: list[tuple[int, int, int]], stream: int) -> None:
        for to, source, count in copies:
            assert to - device.data_ptr() == source - at >= 0
            assert source - at + count <= len(host)
            copied[0] += count
            ctypes.memmove(to, source, count)

    def run_strips(strips: list[tuple[int, int, int, int, int]], stream: int) -> None:
        for to, source, pitch, width, count in strips:
            assert width <= pitch, "CUDA refuses others"
            run([(to + row * pitch, source + row * pitch, width) for row in range(count)], stream)

    copies = HostCopies(run, run_strips)
    copies.collect_rows([(device.data_ptr(), at, rows)], form, wanted)
    copies.queue(0)
    for start, length in wanted.row:
        part = slice(start, start + length)
        assert torch.equal(device.view(rows, -1)[:, part], host.view(rows, -1)[:, part])
    assert copied == [host_copies.copied_bytes(form, wanted, rows)]
    assert copied[0] <= 0.55 * len(host)


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("layers", [2, 1])
def test_deviations_of_tokens_stand_in_a_table(
    engine: CacheTune, layers: int, pinned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: pinned)
    columns = 4 * layers  # of keys and values of two heads
    pieces = [(at, torch.rand(tokens, 8).half()) for at, tokens in ((3, 7), (10, 2), (50, 100))]
    wanted = torch.zeros(LENGTH, columns).half()
    for at, numbers in pieces:
        wanted[at : at + len(numbers)] = numbers[:, :columns]
    adapter, buffers = engine.adapter, buffers_of(engine.adapter)
    with closing(DeadlinePool(None)) as pool:
        plain = LayerLoader(adapter, [], buffers, pool)
        streams = Streams(adapter.device, adapter.num_layers)
        loader = DeviceLoader(adapter, [], buffers, pool, streams)
        assert torch.equal(plain.copy_deviations(pieces, layers), wanted)
        found = loader.copy_deviations(pieces, layers)
        loader.load(0)
        assert torch.equal(found, wanted)
        assert streams.brought in torch.cuda.current_stream().waited, "what computes waits for it"  # type: ignore[attr-defined]
        loader.close()


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("narrowed", [False, True])
def test_nothing_is_written_to_a_layer_before_it_was_waited_for_on_the_stream_that_writes(
    engine: CacheTune, plain: bool, narrowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prompt before may still use the layer's memory."""
    adapter, some, on = engine.adapter, sources(engine, [1, 1, 1]), [torch.cuda.current_stream()]

    @contextmanager
    def entered(stream: Any) -> Iterator[None]:
        on.append(stream)
        yield
        on.pop()

    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device=None: on[-1])
    monkeypatch.setattr(Chunk, "page_locked", True)
    awaited: list[tuple[int, Any]] = []

    def await_layer(layer: int) -> None:
        if layer not in dict(awaited):
            assert all(bool(rows.isnan().all()) for rows in (buffers.key_rows[layer], buffers.value_rows[layer]))
        awaited.append((layer, on[-1]))

    buffers = buffers_of(adapter, await_layer)
    for rows in (*buffers.key_rows, *buffers.value_rows):
        rows.fill_(math.nan)
    streams = Streams(adapter.device, adapter.num_layers)
    with closing(DeadlinePool(None)) as pool:
        loader = (
            LayerLoader(adapter, some, buffers, pool) if plain else DeviceLoader(adapter, some, buffers, pool, streams)
        )
        loader.start_first_layers()
        if narrowed:
            narrow_behind(1, loader)
        for layer in range(adapter.num_layers):
            loader.load(layer)
        loader.close()
    for source in some:
        source.reader.close()
    assert list(dict(awaited)) == list(range(adapter.num_layers))
    assert {stream for _, stream in awaited} == {on[0] if plain else streams.place}


@pytest.mark.parametrize("together", [1, 4])
@pytest.mark.parametrize("busy", [False, True])
def test_second_parts_are_queued_where_nothing_waits_for_them(
    busy: bool, together: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device has copied everything as soon as it is queued, as it does with short prompts. Did the host then queue all second parts at once, the choice, or the first
    layer that computes, would come behind them."""
    layers, looked = 16, 2
    copied: list[int] = []  # how many layers' pieces each call copies
    monkeypatch.setattr(staging, "MOST_PIECES", 2 * together)
    monkeypatch.setattr(Chunk, "page_locked", True)
    monkeypatch.setattr(device_module, "kernels_run_on", lambda _device: True)
    for kernel in ("gather", "place"):  # the order of what is queued is looked at, and no rows
        monkeypatch.setattr(row_kernels.RowKernels, kernel, lambda *args, **kwargs: None)
    monkeypatch.setattr(
        device_module,
        "host_copies",
        lambda: HostCopies(lambda run, stream: copied.append(len(run) // len(TEXTS)), lambda *run: None),
    )
    with opened(tmp_path, llama(layers=layers)) as engine, closing(DeadlinePool(None)) as pool:
        engine.precompute([Document("a", TEXTS)])
        adapter, some = engine.adapter, sources(engine, [1, 1, 1])
        streams = Streams(adapter.device, layers)
        for asked in streams.asked:  # while the device is busy, it has not come to where a layer is asked for
            monkeypatch.setattr(asked, "query", lambda: not busy)
        loader = DeviceLoader(adapter, some, zeroed(adapter), pool, streams)
        narrow_behind(looked, loader)
        first = len(copied)  # what follows is second parts: seen rows are gathered
        assert first == looked
        for layer in range(looked + 1, layers):
            before = len(copied)
            loader.load_seen(layer)
            assert len(copied) - before <= busy, (
                "no layer of the look waits for more than one, and then the device is busy"
            )
        before = len(copied)
        loader.set_sources(some)
        loader.start()
        assert len(copied) - before == 1, "the bus has something to do, and the first layer soon begins"
        for layer in range(layers):
            before = len(copied)
            loader.load(layer)
            there, wanted = sum(copied) - first, layers - first
            assert there >= min(wanted, layer + 1 - first), "they are there when their layers compute"
            assert len(copied) - before <= 1 + device_module.LAUNCH_AHEAD
            if busy:
                assert there >= min(wanted, layer + 1), (
                    "one with each layer, so that they are copied while the device computes"
                )
        assert sum(copied) == layers, "each row is copied once but for those that are gathered"
        assert max(copied) == together
        loader.close()
        for source in some:
            source.reader.close()


def queued_together(
    engine: CacheTune, monkeypatch: pytest.MonkeyPatch, looked: int = 2
) -> tuple[dict[str, list[range]], dict[str, int]]:
    """Which layers are queued together for each part, where a selector narrows the rows behind `looked` layers; and how often the driver is called."""
    found: dict[str, list[range]] = {"whole": [], "seen": [], "rest": []}
    calls = dict.fromkeys(("copies", "launches", "events", "waits", "streams"), 0)
    monkeypatch.setattr(Chunk, "page_locked", True)
    monkeypatch.setattr(device_module, "kernels_run_on", lambda _device: True)

    def copied(run: Any, stream: int) -> None:
        calls["copies"] += 1

    def place(self: Any, layers: range, *_: Any, split: Any, rest: bool, **__: Any) -> None:
        calls["launches"] += 1
        found["whole" if split is None else "rest" if rest else "seen"].append(layers)

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(device_module, "host_copies", lambda: HostCopies(copied, lambda *run: None))
    monkeypatch.setattr(row_kernels.RowKernels, "place", place)
    monkeypatch.setattr(row_kernels.RowKernels, "gather", counted("launches", lambda *_, **__: None))
    monkeypatch.setattr(Event, "record", counted("events", Event.record))
    monkeypatch.setattr(Stream, "wait_event", counted("waits", Stream.wait_event))
    monkeypatch.setattr(torch.cuda, "stream", counted("streams", torch.cuda.stream))
    adapter, some = engine.adapter, sources(engine, [1, 1, 1])
    layers = range(adapter.num_layers)
    with closing(DeadlinePool(None)) as pool:
        loader = DeviceLoader(adapter, some, zeroed(adapter), pool, Streams(adapter.device, len(layers)))
        loader.start_first_layers()
        loader.expect_narrowing(looked)
        for layer in layers:
            if layer == looked:
                loader.narrow(torch.ones(LENGTH, dtype=torch.bool))
            loader.load_seen(layer)
        loader.start()
        for layer in layers:
            loader.load(layer)
        loader.close()
    for source in some:
        source.reader.close()
    return found, dict(calls)


def test_layers_of_a_short_prompt_are_queued_together_and_the_first_ones_singly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queuing a layer takes the host longer than a device needs to copy the rows of a short prompt. But what computes should begin with the first one."""
    with opened(tmp_path, llama(layers=32)) as engine:
        engine.precompute([Document("a", TEXTS)])
        found, calls = queued_together(engine, monkeypatch, looked=8)
        whole = [range(1), range(1, 2), range(2, 3), range(3, 6), range(6, 9)]
        first = [range(9, 10), range(10, 11), range(11, 13), *(range(at, min(32, at + 4)) for at in range(13, 32, 4))]
        assert found == {"whole": whole, "seen": first, "rest": first}
        assert calls["copies"] == len(whole) + len(first), "seen rows are gathered"
        assert calls["launches"] == len(whole) + 3 * len(first)
        times, asked = len(whole) + 2 * len(first), 2 * 32
        # For each time that something is queued: its copies, its rows in place. For each layer that is asked for: before and behind the wait.
        # The tables, the rows that are seen, and the buffers.
        assert calls["events"] <= 2 * times + 2 * asked + 3
        # The memory of four layers at most, their copies; and what computes waits for each layer.
        assert calls["waits"] <= 4 * times + asked + 3
        assert calls["streams"] <= times + len(first) + 5
        # The same, layer by layer.
        monkeypatch.setattr(staging, "MOST_PIECES", staging.LEAST_PIECES)
        alone, more = queued_together(engine, monkeypatch, looked=8)
        assert alone["whole"] + alone["seen"] == [range(layer, layer + 1) for layer in range(32)]
        assert more["launches"] == 9 + 3 * 23
        assert sum(more.values()) > 1.6 * sum(calls.values())


@pytest.mark.parametrize("reason", ["bytes", "shape", "unaligned", "apart", "turn"])
def test_layers_are_queued_together_where_they_are_few_bytes_and_alike(
    reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "MOST_PIECES", 8)
    with opened(tmp_path, llama(layers=16)) as engine:
        engine.precompute([Document("a", TEXTS)])
        adapter = engine.adapter
        if reason == "bytes":
            monkeypatch.setattr(staging, "SMALL_RING", 1)
        elif reason == "shape":
            made = row_kernels.RowKernels.alike_until

            def until(self: Any, forms: Any, *more: Any) -> list[int]:
                # The rows of the tenth layer lie otherwise.
                return made(self, [[*form[:9], object(), *form[10:]] for form in forms], *more)

            monkeypatch.setattr(row_kernels.RowKernels, "alike_until", until)
        elif reason == "turn":
            turned, others = adapter.rotation, adapter.rotary_tables(LENGTH)
            monkeypatch.setattr(
                adapter, "rotation", lambda layer, tables: turned(layer, others if layer == 9 else tables)
            )
        else:  # the tenth layer's memory is elsewhere
            usual = buffers_of

            def apart(*_: Any) -> KVBuffers:
                buffers = usual(adapter)
                keys, more = buffers.key_rows[9], 8 if reason == "unaligned" else 0
                buffers.key_rows[9] = torch.empty(keys.numel() + more)[more:].view(keys.shape)
                return buffers

            monkeypatch.setitem(globals(), "buffers_of", apart)
        found, _ = queued_together(engine, monkeypatch)
        every = [*found["whole"], *found["seen"]]
        assert [layer for layers in every for layer in layers] == list(range(16))
        assert [layer for layers in found["rest"] for layer in layers] == list(range(3, 16))
        if reason == "bytes":
            assert max(map(len, every)) == 1
        else:
            assert max(map(len, every)) > 1
            # Of two layers, any distance is the same from one to the next.
            most = 2 if reason == "apart" else 1
            assert not any(len(layers) > most and 9 in layers for layers in every + found["rest"])
