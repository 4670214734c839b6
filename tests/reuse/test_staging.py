"""Two prompts' rows go through the same staging memory: nothing is copied over rows that the device may not have placed yet, and every row comes to its place."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import plain_kernels
import pytest
import torch
from tiny import llama, tokenizer

from cachetune_rag import CacheTune, Document
from cachetune_rag.concurrency.deadline import DeadlinePool
from cachetune_rag.model import KVBuffers
from cachetune_rag.reuse import device_loader, layer_loader, row_copies, staging
from cachetune_rag.reuse.device_loader import DeviceLoader
from cachetune_rag.reuse.host_copies import HostCopies
from cachetune_rag.reuse.layer_loader import LayerLoader
from cachetune_rag.reuse.row_kernels import RowKernels
from cachetune_rag.reuse.source import Source
from cachetune_rag.reuse.streams import Streams
from cachetune_store.chunk import Chunk

TEXTS = [
    "Visitors climb 214 steps, of which the last forty are a ladder.",
    "The house is a museum.",
    "It was built in 1871.",
]
LENGTH = 150


class Device:
    """Streams that do everything at once, and know what has to be done before what they are given next: no more than CUDA promises.

    Attributes:
        current: the current stream.
        reached: whether what was queued so far counts as done.
    """

    def __init__(self) -> None:
        self.streams: list[Any] = []
        self.current, self.reached = self.stream(), True
        self._used: list[
            tuple[int, int, bool]
        ] = []  # address, bytes and whether it was written to, of each piece of work, in order

    def stream(self, *_: Any, **__: Any) -> Any:
        made = SimpleNamespace(before=set[int](), cuda_stream=len(self.streams))
        made.wait_event = lambda event: made.before.update(event.before)
        made.wait_stream = lambda stream: made.before.update(stream.before)
        made.synchronize = lambda: None
        made.record_event = lambda: self.event().at(made)
        self.streams.append(made)
        return made

    def event(self, *_: Any, **__: Any) -> Any:
        made = SimpleNamespace(before=frozenset[int](), synchronize=lambda: None, query=lambda: self.reached)

        def at(stream: Any) -> Any:
            made.before = frozenset(stream.before)
            return made

        made.record = made.at = at
        return made

    @contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def use(self, stream: Any, address: int, count: int, writes: bool) -> None:
        """Work on some memory is given to a stream."""
        for number, (other, bytes_, wrote) in enumerate(self._used):
            if (writes or wrote) and other < address + count and address < other + bytes_:
                assert number in stream.before, (
                    "memory is written to while others may use it, or read while it may be written to"
                )
        stream.before.add(len(self._used))
        self._used.append((address, count, writes))


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    made = Device()
    monkeypatch.setattr(torch.cuda, "Stream", made.stream)
    monkeypatch.setattr(torch.cuda, "Event", made.event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device=None: made.current)
    monkeypatch.setattr(torch.cuda, "stream", made.on)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    decoding = layer_loader.get_codec

    def codec(name: str) -> Any:
        def decode(encoded: torch.Tensor, *more: Any) -> Any:
            made.use(made.current, encoded.data_ptr(), encoded.numel(), writes=False)
            return decoding(name).decode(encoded, *more)

        return SimpleNamespace(decode=decode, row_format=decoding(name).row_format)

    monkeypatch.setattr(layer_loader, "get_codec", codec)
    return made


@pytest.fixture(params=["by address", "by torch", "together"])
def engine(
    request: pytest.FixtureRequest, tmp_path: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> Iterator[CacheTune]:
    def run(copies: list[tuple[int, int, int]], stream: int) -> None:
        for to, at, count in copies:
            device.use(device.streams[stream], to, count, writes=True)
            ctypes.memmove(to, at, count)

    def copy_all(targets: Sequence[torch.Tensor], pieces: Sequence[torch.Tensor], **_: Any) -> None:
        for to, piece in zip(targets, pieces, strict=True):
            device.use(device.current, to.data_ptr(), to.numel(), writes=True)
            to.copy_(piece)

    by_address, together = request.param != "by torch", request.param == "together"
    monkeypatch.setattr(device_loader, "kernels_run_on", lambda _device: together)
    monkeypatch.setattr(staging, "MOST_PIECES", 4)
    if together:  # two layers at a time, and single rows of the later ones first
        plain_kernels.install(monkeypatch, lambda *what: device.use(device.current, *what))
        monkeypatch.setattr(Chunk, "page_locked", True)
    monkeypatch.setattr(
        device_loader, "host_copies", lambda: HostCopies(run, lambda _strips, _stream: None) if by_address else None
    )
    monkeypatch.setattr(row_copies, "copy_all", copy_all)
    with CacheTune(llama(layers=10 if together else 5), tokenizer(), tmp_path) as made:
        made.adapter.half_split = [True] * made.adapter.num_layers
        made.precompute([Document("a", TEXTS)])
        yield made


def prompt(engine: CacheTune, texts: Sequence[str]) -> tuple[list[Source], KVBuffers]:
    """A prompt's chunks, and memory for it, which is zero."""
    start, found = 3, []
    for text in texts:
        reader = engine.store.open(engine.runtime.assembler.key(engine.prompts.encode(text)))
        assert reader is not None
        found.append(Source(reader, start, reader.layout.tokens))
        start += reader.layout.tokens + 1
    memory = torch.empty(engine.adapter.buffer_bytes(LENGTH), dtype=torch.uint8)
    buffers = engine.adapter.new_buffers(LENGTH, memory=memory)
    for rows in (*buffers.key_rows, *buffers.value_rows):
        rows.zero_()
    return found, buffers


@pytest.mark.parametrize("order", ["behind", "side by side"])
@pytest.mark.parametrize(
    ("first", "second"),
    [(TEXTS, TEXTS[::-1]), (TEXTS, TEXTS[1:]), (TEXTS[1:], TEXTS)],
    ids=["equal", "shorter", "longer"],
)
def test_two_prompts_share_staging_memory_and_neither_is_written_over(
    engine: CacheTune, device: Device, first: Sequence[str], second: Sequence[str], order: str
) -> None:
    adapter, layers = engine.adapter, range(engine.adapter.num_layers)
    streams = Streams(adapter.device, adapter.num_layers)
    prompts = [prompt(engine, texts) for texts in (first, second)]
    plain = [prompt(engine, texts) for texts in (first, second)]
    with closing(DeadlinePool(None)) as pool:
        one = DeviceLoader(adapter, *prompts[0], pool, streams)
        one.load(0)
        alone = streams.staging.size
        if order == "behind":  # as a server does: all of the first one's rows are queued when the second is begun
            for layer in layers:
                one.load(layer)
        with torch.cuda.stream(streams.place):
            two = DeviceLoader(adapter, *prompts[1], pool, streams)
            device.reached = False
            two.bring()
            assert not two.is_loaded(0), "no copy for anybody else waits behind one that has to wait itself"
            device.reached = True
            if order == "behind":
                two.bring()
                assert two.is_loaded(0)
        for layer in layers:
            one.load(layer)
            two.load(layer)
        if len(second) <= len(first):
            assert streams.staging.size == alone > 0
        one.close()
        del one
        assert streams.staging.size > 0
        two.close()
        del two
        assert streams.staging.size == 0, "memory is freed with the last loader that uses it"
        for (sources, found), (others, wanted) in zip(prompts, plain, strict=True):
            loader = LayerLoader(adapter, others, wanted, pool)
            for layer in layers:
                loader.load(layer)
                assert torch.equal(found.key_rows[layer], wanted.key_rows[layer])
                assert torch.equal(found.value_rows[layer], wanted.value_rows[layer])
            loader.close()
            assert wanted.key_rows[0].any()
            for source in (*sources, *others):
                source.reader.close()


@pytest.mark.parametrize("engine", ["together"], indirect=True)
def test_rows_in_two_parts_are_not_written_over_and_waited_for(
    engine: CacheTune, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    placed: dict[tuple[int, int], set[int]] = {}  # by buffers and layer: the work behind which its rows are there
    unwatched = RowKernels.place

    def place(
        self: RowKernels, layers: range, key: Any, form: Any, buffers: KVBuffers, *more: Any, **given: Any
    ) -> None:
        unwatched(self, layers, key, form, buffers, *more, **given)
        placed.update({(id(buffers), layer): set(device.current.before) for layer in layers})

    monkeypatch.setattr(RowKernels, "place", place)
    adapter, layers = engine.adapter, range(engine.adapter.num_layers)
    streams = Streams(adapter.device, adapter.num_layers)
    (sources, found), (others, wanted), (more, beside) = (prompt(engine, TEXTS) for _ in range(3))
    seen = torch.rand(LENGTH, generator=torch.Generator().manual_seed(1)) < 0.4
    with closing(DeadlinePool(None)) as pool:
        loader, other = (DeviceLoader(adapter, *each, pool, streams) for each in ((sources, found), (more, beside)))
        loader.start_first_layers()
        loader.expect_narrowing(2)
        first_parts = []
        for layer in layers:
            if layer == 2:
                loader.narrow(seen)
            loader.load_seen(layer)
            first_parts.append(found.key_rows[layer][seen])
            assert placed[id(found), layer] <= device.current.before
            other.load(layer)
            assert placed[id(beside), layer] <= device.current.before
        loader.start()
        for layer in layers:
            loader.load(layer)
            assert placed[id(found), layer] <= device.current.before
        # Last, because its own memory may be where that of the others was.
        whole = LayerLoader(adapter, others, wanted, pool)
        for layer in layers:
            whole.load(layer)
            assert torch.equal(first_parts[layer], wanted.key_rows[layer][seen])
            for rows in (found, beside):
                assert torch.equal(rows.key_rows[layer], wanted.key_rows[layer])
                assert torch.equal(rows.value_rows[layer], wanted.value_rows[layer])
        for each in (whole, loader, other):
            each.close()
    for source in (*sources, *others, *more):
        source.reader.close()


def test_of_a_prompt_that_is_begun_two_layers_are_on_their_way_at_once(engine: CacheTune, device: Device) -> None:
    """However many pieces the ring has: others' copies wait behind these."""
    sources, buffers = prompt(engine, TEXTS)
    streams = Streams(engine.adapter.device, engine.adapter.num_layers)
    with closing(DeadlinePool(None)) as pool, torch.cuda.stream(streams.place):
        loader = DeviceLoader(engine.adapter, sources, buffers, pool, streams)
        device.reached = False
        for _ in range(2):
            loader.bring()
            assert [loader.is_loaded(layer) for layer in range(4)] == [True, True, False, False]
        device.reached = True
        loader.bring()
        assert all(loader.is_loaded(layer) for layer in range(engine.adapter.num_layers))
        loader.close()
    for source in sources:
        source.reader.close()
