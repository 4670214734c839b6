"""Loading onto a CUDA device, beside the computation.

One stream copies a layer's encoded rows into a ring of staging buffers; another decodes, rotates and scatters them from there
into the prompt's buffers, layer after layer. The stream that computes waits for the event of the layer it needs and for nothing
else. The prompt's buffers hold every layer, so neither ever waits for the computation, only for the disk.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from cachetune_rag.kernels import CODECS, kernels_run_on
from cachetune_rag.model import KVBuffers, ModelAdapter
from cachetune_rag.pipeline.copies import copy_to_device
from cachetune_rag.pipeline.loader import LayerLoader, Source

STAGES = 2
"""Staging buffers: while one is decoded, the next is copied into."""
LAUNCH_AHEAD = 3
"""Further layers queued each time one is asked for, so that the copy engine never runs dry; few, as queuing takes the host
time in which the device waits for its next piece of work."""


class Streams:
    """The streams beside the one that computes; made once, used by one request after another."""

    def __init__(self, device: torch.device):
        self.copy = torch.cuda.Stream(device)
        # What places rows is short and awaited: it goes before whatever else is ready to run.
        self.place = torch.cuda.Stream(device, priority=-1)


class DeviceLoader(LayerLoader):
    """As `LayerLoader`, on streams of its own. Where rows come from host memory, nothing here waits for anything."""

    def __init__(
        self,
        adapter: ModelAdapter,
        sources: Sequence[Source],
        buffers: KVBuffers,
        pool: ThreadPoolExecutor,
        streams: Streams,
    ):
        self._copying, self._placing = streams.copy, streams.place
        self._events: list[torch.cuda.Event | None] = [None] * adapter.num_layers
        self._free: list[torch.cuda.Event | None] = [None] * STAGES
        self._stages: list[dict[tuple[str, str], Tensor]] = [{} for _ in range(STAGES)]
        self._next = 0
        self._kernel = kernels_run_on(adapter.device)
        self._copy = copy_to_device()
        self._held: list[Tensor] = []  # what launched work still reads
        super().__init__(adapter, sources, buffers, pool)
        # The buffers' memory may still be in use by what the computing stream was given before.
        self._placing.wait_stream(torch.cuda.current_stream(adapter.device))

    def load(self, layer: int) -> None:
        """Make the computing stream wait for the reused rows of `layer`."""
        started = time.perf_counter()
        while self._next <= layer:
            self._launch()
        self._launch_ahead()
        event = self._events[layer]
        if event is not None:
            torch.cuda.current_stream(self._adapter.device).wait_event(event)
        self.seconds += time.perf_counter() - started

    def begin(self) -> None:
        """See `LayerLoader.begin`."""
        super().begin()
        if self._in_host_memory:
            self._launch_ahead()
        else:
            self._read_on(self._next)

    def close(self) -> None:
        """See `LayerLoader.close`: what is under way on the device comes before what the computing stream does next."""
        super().close()
        current = torch.cuda.current_stream(self._adapter.device)
        current.wait_stream(self._copying)
        current.wait_stream(self._placing)

    def _launch_ahead(self) -> None:
        for _ in range(LAUNCH_AHEAD):
            if self._next >= self._adapter.num_layers or not self._ready(self._next):
                return
            self._launch()

    def _launch(self) -> None:
        """Queue the next layer's copies and what turns them into keys and values. Waits only for rows on the disk."""
        layer = self._next
        slot = layer % STAGES
        if (free := self._free[slot]) is not None:
            self._copying.wait_event(free)
        rows = None if self._in_host_memory else iter(self._rows(layer))
        for key, group in self._groups.items():
            width = self._row_bytes(layer, key)
            sizes = [source.rows * width for source in group]
            with torch.cuda.stream(self._copying):
                encoded = self._stage(slot, key, sum(sizes))
                if rows is None:
                    self._copy_by_address(layer, group, encoded.data_ptr(), width)
                else:
                    pieces = [next(rows).view(-1) for _ in group]
                    torch._foreach_copy_(list(encoded.split(sizes)), pieces, non_blocking=True)
            self._placing.wait_stream(self._copying)
            with torch.cuda.stream(self._placing):
                self._place(layer, key, encoded.view(-1, width))
        event = torch.cuda.Event()
        self._placing.record_event(event)
        self._events[layer] = self._free[slot] = event
        self._loaded[layer] = 1
        self._next += 1

    @property
    def _in_host_memory(self) -> bool:
        """Whether every row lies in host memory, where it can be copied from by address."""
        return self._copy is not None and not self._read_ahead

    def _copy_by_address(self, layer: int, group: Sequence[Source], to: int, width: int) -> None:
        copy, stream = self._copy, self._copying.cuda_stream
        assert copy is not None
        for source in group:
            count = source.rows * width
            copy(to, source.reader.locate(layer, source.rows), count, stream)
            to += count

    def _stage(self, slot: int, key: tuple[str, str], size: int) -> Tensor:
        """Staging memory of one slot, `size` bytes; made anew only where it is too small."""
        held = self._stages[slot].get(key)
        if held is None or held.numel() < size:
            held = self._stages[slot][key] = torch.empty(size, dtype=torch.uint8, device=self._adapter.device)
            held.record_stream(self._placing)
        return held[:size]

    def _placed(self, key: tuple[str, str]) -> Tensor:
        """See `LayerLoader._placed`; copied without waiting for what the streams are at."""
        places = self._places.get(key)
        if places is None:
            host = torch.cat([s.places[: s.rows] for s in self._groups[key]]).pin_memory()
            with torch.cuda.stream(self._placing):
                places = self._places[key] = host.to(self._adapter.device, non_blocking=True)
            self._held += [host, places]
        return places

    def _place(self, layer: int, key: tuple[str, str], encoded: Tensor) -> None:
        """Decode, rotate, scatter: the kernel where it is exact, the codec's and the model's own code elsewhere."""
        codec, dtype = key
        places = self._placed(key)
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
