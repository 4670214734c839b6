"""Loading onto a CUDA device, beside the computation.

One stream copies a layer's encoded rows into a ring of staging buffers; another decodes, rotates and scatters them from there
into the prompt's buffers, layer after layer. The stream that computes waits for the event of the layer it needs and for nothing
else. The prompt's buffers hold every layer, so neither ever waits for the computation, only for the disk.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cachetune_rag.kernels import CODECS, kernels_run_on
from cachetune_rag.model import KVBuffers, ModelAdapter
from cachetune_rag.pipeline.copies import host_copies
from cachetune_rag.pipeline.loader import LayerLoader, Source

STAGES = 2
"""Staging buffers: while one is decoded, the next is copied into."""
LAUNCH_AHEAD = 3
"""Further layers queued each time one is asked for, so that the copy engine never runs dry; few, as queuing takes the host
time in which the device waits for its next piece of work."""


class Streams:
    """The streams and events beside the stream that computes; made once, used by one request after another."""

    def __init__(self, device: torch.device, layers: int):
        self.copy = torch.cuda.Stream(device)
        # What places rows is short and awaited: it goes before whatever else is ready to run.
        self.place = torch.cuda.Stream(device, priority=-1)
        self.copied = [torch.cuda.Event() for _ in range(layers)]
        self.brought = torch.cuda.Event()
        self.placed = [torch.cuda.Event() for _ in range(layers)]


class DeviceLoader(LayerLoader):
    """As `LayerLoader`, on streams of its own. Where rows come from host memory, nothing here waits for anything.

    A copy to the device, however small, waits for all copies that were queued before it, whatever stream it is on: there is
    one engine for them. So nothing but this class copies to the device while it is at work, and it copies in the order in
    which things are needed.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        sources: Sequence[Source],
        buffers: KVBuffers,
        pool: ThreadPoolExecutor,
        streams: Streams,
    ):
        self._streams, self._current = streams, torch.cuda.current_stream(adapter.device)
        self._stages: list[dict[tuple[str, str], Tensor]] = [{} for _ in range(STAGES)]
        self._next = 0
        self._brought = False
        self._kernel = kernels_run_on(adapter.device)
        self._copies = host_copies()
        self._held: list[Tensor] = []  # what launched work still reads
        super().__init__(adapter, sources, buffers, pool)
        # The buffers' memory may still be in use by what the computing stream was given before.
        streams.place.wait_stream(self._current)

    def load(self, layer: int) -> None:
        """Make the computing stream wait for the reused rows of `layer`."""
        started = time.perf_counter()
        while self._next <= layer:
            self._launch()
        self._launch_ahead(LAUNCH_AHEAD)
        if self._brought:
            self._current.wait_event(self._streams.brought)
            self._brought = False
        self._current.wait_event(self._streams.placed[layer])
        self.seconds += time.perf_counter() - started

    def begin(self) -> None:
        """See `LayerLoader.begin`."""
        started = time.perf_counter()
        if self._in_host_memory:
            self._launch_ahead(1)
        else:
            self._read_on(self._next)
        self.seconds += time.perf_counter() - started

    def bring(self, numbers: Tensor) -> Tensor:
        """See `LayerLoader.bring`: copied behind the rows that are queued already, and waited for by the first `load`."""
        streams = self._streams
        host = numbers if numbers.is_pinned() else numbers.pin_memory()
        with torch.cuda.stream(streams.copy):
            there = host.to(self._adapter.device, non_blocking=True)
        streams.brought.record(streams.copy)
        there.record_stream(self._current)
        self._held += [host, there]
        self._brought = True
        return there

    def close(self) -> None:
        """See `LayerLoader.close`: what is under way on the device comes before what the computing stream does next."""
        super().close()
        self._current.wait_stream(self._streams.copy)
        self._current.wait_stream(self._streams.place)

    def _launch_ahead(self, layers: int) -> None:
        for _ in range(layers):
            if self._next >= self._adapter.num_layers or not self._ready(self._next):
                return
            self._launch()

    def _launch(self) -> None:
        """Queue the next layer's copies and what turns them into keys and values. Waits only for rows on the disk."""
        layer, streams = self._next, self._streams
        if layer >= STAGES:
            streams.copy.wait_event(streams.placed[layer - STAGES])
        rows = None if self._in_host_memory else iter(self._rows(layer))
        staged = []
        for key, group in self._groups.items():
            width = self._row_bytes(layer, key)
            sizes = [source.rows * width for source in group]
            places = self._placed(key)
            encoded = self._stage(layer % STAGES, key, sum(sizes))
            if rows is None:
                self._add_copies(layer, group, encoded.data_ptr(), width)
            else:
                pieces = [next(rows).view(-1) for _ in group]
                with torch.cuda.stream(streams.copy):
                    torch._foreach_copy_(list(encoded.split(sizes)), pieces, non_blocking=True)
            staged.append((key, encoded.view(-1, width), places))
        if self._copies is not None:
            self._copies.queue(streams.copy.cuda_stream)
        streams.copied[layer].record(streams.copy)
        streams.place.wait_event(streams.copied[layer])
        if staged:
            with torch.cuda.stream(streams.place):
                for key, encoded, places in staged:
                    self._place(layer, key, encoded, places)
        streams.placed[layer].record(streams.place)
        self._loaded[layer] = 1
        self._next += 1

    @property
    def _in_host_memory(self) -> bool:
        """Whether every row lies in host memory, where it can be copied from by address."""
        return self._copies is not None and not self._read_ahead

    def _add_copies(self, layer: int, group: Sequence[Source], to: int, width: int) -> None:
        assert self._copies is not None
        for source in group:
            count = source.rows * width
            self._copies.add(to, source.reader.locate(layer, source.rows), count)
            to += count

    def _stage(self, slot: int, key: tuple[str, str], size: int) -> Tensor:
        """Staging memory of one slot, `size` bytes; made anew only where it is too small."""
        held = self._stages[slot].get(key)
        if held is None or held.numel() < size:
            with torch.cuda.stream(self._streams.copy):
                held = torch.empty(size, dtype=torch.uint8, device=self._adapter.device)
            held.record_stream(self._streams.place)
            self._stages[slot][key] = held
        return held[:size]

    def _placed(self, key: tuple[str, str]) -> Tensor:
        """See `LayerLoader._placed`; copied before the rows that it is for, on the same stream."""
        places = self._places.get(key)
        if places is None:
            host = torch.from_numpy(_host_places(self._groups[key])).pin_memory()
            with torch.cuda.stream(self._streams.copy):
                places = self._places[key] = host.to(self._adapter.device, non_blocking=True)
            places.record_stream(self._streams.place)
            self._held += [host, places]
        return places

    def _place(self, layer: int, key: tuple[str, str], encoded: Tensor, places: Tensor) -> None:
        """Decode, rotate, scatter: the kernel where it is exact, the codec's and the model's own code elsewhere."""
        codec, dtype = key
        if (
            self._kernel
            and codec in CODECS
            and self._adapter.half_split[layer]
            and dtype == str(self._adapter.dtype).removeprefix("torch.")
        ):
            from cachetune_rag.kernels.rows import place

            cos, sin = self._adapter.rotation(layer, self._tables)
            keys, values = self._buffers.key_rows[layer], self._buffers.value_rows[layer]
            place(encoded, places, cos, sin, keys, values, codec=codec)
        else:
            self._place_rows(layer, key, encoded, places)


def _host_places(group: Sequence[Source]) -> npt.NDArray[np.int64]:
    """Places of a group's rows. By NumPy: torch would wake its threads, which takes longer than the work."""
    return np.concatenate([source.places[: source.rows].numpy() for source in group])
