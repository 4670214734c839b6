"""The loader for GPUs, over streams that do everything at once: what is queued, in which order, and for which layer.

Whether streams really run side by side is for the card (tests/test_gpu.py); what the loader asks of them is seen here.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import llama, tokenizer

from cachetune_rag import CacheTune, Document
from cachetune_rag.pipeline import device as device_module
from cachetune_rag.pipeline.copies import HostCopies
from cachetune_rag.pipeline.device import DeviceLoader, Streams
from cachetune_rag.pipeline.loader import LayerLoader, Source

TEXTS = ["The lighthouse was built in 1871.", "Visitors climb 214 steps.", "The last forty are a ladder."]


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

    def record(self, stream: Any = None) -> None:
        self.recorded = True


@pytest.fixture(autouse=True)
def _immediate(monkeypatch: pytest.MonkeyPatch) -> None:
    current = Stream()
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device=None: current)
    monkeypatch.setattr(torch.cuda, "stream", lambda _stream: nullcontext())
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    monkeypatch.setattr(device_module, "kernels_run_on", lambda _device: False)


@pytest.fixture(params=[("exact", True), ("int8", True), ("exact", False)], ids=["exact", "int8", "without-addresses"])
def engine(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[CacheTune]:
    codec, by_address = request.param

    def run(copies: list[tuple[int, int, int]], stream: int) -> None:
        assert stream == Stream.cuda_stream
        for to, at, count in copies:
            ctypes.memmove(to, at, count)

    monkeypatch.setattr(device_module, "host_copies", lambda: HostCopies(run) if by_address else None)
    with CacheTune(llama(layers=8), tokenizer(), tmp_path, codec=codec) as made:
        made.precompute([Document("a", TEXTS)])
        yield made


def sources(engine: CacheTune, shares: list[float]) -> list[Source]:
    start, found = 5, []
    for text, share in zip(TEXTS, shares, strict=True):
        reader = engine.store.open(engine._assembler.key(engine.prompts.encode(text)))
        assert reader is not None
        found.append(Source(reader, start, int(share * reader.layout.tokens)))
        start += reader.layout.tokens + 2
    return found


@pytest.mark.parametrize("tier", ["host", "disk"])
@pytest.mark.parametrize("probed", [0, 2])
def test_buffers_are_as_the_plain_loader_fills_them(
    engine: CacheTune, tier: str, probed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if tier == "disk":  # another engine over the same directory, with nothing in host memory
        with CacheTune(engine.adapter.model, tokenizer(), tmp_path, host_budget=0) as cold:
            check(cold, probed, "disk")
    else:
        check(engine, probed, "host")


def check(engine: CacheTune, probed: int, tier: str) -> None:
    adapter = engine.adapter
    filled = []
    with ThreadPoolExecutor(2) as pool:
        for plain in (True, False):
            buffers = adapter.new_buffers(150)
            for rows in (*buffers.key_rows, *buffers.value_rows):
                rows.zero_()
            whole, some = sources(engine, [1, 1, 1]), sources(engine, [0.5, 1, 0])
            assert {s.reader.tier for s in whole} == {tier}
            if plain:
                loader = LayerLoader(adapter, whole, buffers, pool)
            else:
                loader = DeviceLoader(adapter, whole, buffers, pool, Streams(adapter.device, adapter.num_layers))
            for layer in range(probed):
                loader.load(layer)
            ahead = list(loader._loaded)
            loader.set_sources(some)
            loader.begin()
            for layer in range(adapter.num_layers):
                loader.load(layer)
                assert loader._loaded[layer]
            loader.close()
            for source in (*whole, *some):
                source.reader.close()
            filled.append((buffers, ahead))
    (wanted, _), (found, ahead) = filled
    places = torch.cat([s.places[: s.rows] for s in some])
    for layer in range(adapter.num_layers):
        # Layers queued before the sources changed hold more rows than are needed: those at `places` are what counts.
        at = slice(None) if not ahead[layer] or layer < probed else places
        assert torch.equal(found.key_rows[layer][at], wanted.key_rows[layer][at])
        assert torch.equal(found.value_rows[layer][at], wanted.value_rows[layer][at])
