"""Loading onto a CUDA device, while the model computes.

One stream copies a layer's encoded rows into a ring of pieces of staging memory (`staging.py`). Another stream decodes and rotates them and puts them into the
prompt's buffers, layer after layer. Of a short prompt, several layers are queued by one call each for their copies, kernels and events: a layer's rows are there before the
host has made these calls for it. Rows of the device tier are decoded where they lie, without a copy. The stream that computes waits
for the event of the layer that it needs, and for nothing else. The prompt's buffers hold every layer, so the two loading streams never
wait for the computation, only for the disk.

Where other processes have some of the model's heads, the bytes of this one's heads alone are copied, to where they lie in the row: so decoding is
the same, and the other bytes of the staging memory mean nothing.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cachetune_rag.concurrency.deadline import DeadlinePool
from cachetune_rag.kernels import kernels_run_on
from cachetune_rag.model import KVBuffers, ModelAdapter
from cachetune_rag.reuse.device_groups import DeviceGroups, Narrowed
from cachetune_rag.reuse.host_copies import host_copies
from cachetune_rag.reuse.layer_loader import REST, SEEN, WHOLE, LayerLoader, RowForms
from cachetune_rag.reuse.row_copies import RowCopies
from cachetune_rag.reuse.row_kernels import RowKernels
from cachetune_rag.reuse.source import Source
from cachetune_rag.reuse.staging import LEAST_PIECES
from cachetune_rag.reuse.streams import Streams

LAUNCH_AHEAD = 2
"""Layers queued beyond the one that is asked for, so that the copy engine always has work. Few, because queuing takes the host time, in
which the device waits for its next piece of work."""
QUEUED = 3
"""Layers whose copies may be queued at once, or of short prompts several times as many, which are queued together. A copy for somebody else, such as the inputs
of a server's next decoding step, waits behind all of them: with all layers of a long prompt queued, for tens of milliseconds."""
FIRST_BYTES = 48 << 20
"""Bytes that are queued before a selector looks at layers: about as much as is copied to an H100 while it gets ready."""


class DeviceLoader(LayerLoader):
    """As `LayerLoader`, on streams of its own. The host waits for rows on disk, and while `QUEUED` layers are on their way.

    After `narrow`, single rows of chunks in page-locked memory are copied, those that are seen. Once all layers have these, the chunks are copied
    whole, and their other rows put into their places.

    A copy to the device, however small, waits for all copies that were queued before it on any stream, because one copy engine makes
    them all. So nothing else may copy to the device while a loader is at work, and the loader copies in the order in which the rows
    are needed.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        sources: Sequence[Source],
        buffers: KVBuffers,
        pool: DeadlinePool,
        streams: Streams,
    ):
        self._streams, self._current = streams, torch.cuda.current_stream(adapter.device)
        # Recorded when the rows that were queued last are placed.
        self._queued: deque[torch.cuda.Event] = deque(maxlen=QUEUED)
        self._next = 0
        self._hold = adapter.num_layers  # nothing is queued behind this layer before it is asked for
        self._seen_rows: Tensor | None = None
        # The first layer in two parts, and the next one of which the second part is queued.
        self._first_narrowed = self._rest = adapter.num_layers
        self._brought = False
        self._alike_until: list[int] | None = None  # for chunks of these groups:
        self._alike_groups: list[tuple[str, str]] = []
        # Layers that were queued since all rows were wanted, or the seen ones alone; and those of which the second part was.
        self._begun_layers = self._begun_rests = 0
        self._awaited = 0  # so many of the first layers the computing stream waits for, in its order
        self._kernels = RowKernels(adapter, usable=kernels_run_on(adapter.device))
        self._copies = host_copies()
        forms = RowForms(adapter)
        self._on_device = DeviceGroups(
            adapter, streams, self._kernels, by_address=self._copies is not None, forms=forms
        )
        self._held: list[Tensor] = []  # memory that queued work still reads
        self._row_copies = RowCopies(streams, self._kernels, self._on_device, self._copies, forms, keep=QUEUED)
        super().__init__(adapter, sources, buffers, pool, forms)
        # Work that was queued on the computing stream before may still use the buffers' memory. (If they were made on the placing stream,
        # it may not, and this waits for nothing.)
        streams.place.wait_stream(self._current)
        self._placed = list(streams.placed)  # by layer, the event that was recorded when its rows were placed
        self._made = streams.place.record_event() if self._current == streams.place else None

    def set_sources(self, sources: Sequence[Source]) -> None:
        """See `LayerLoader.set_sources`."""
        before = self._wanted
        super().set_sources(sources)
        if self._wanted is not before:
            self._on_device.set_sources(self._groups)
            if self._alike_groups != (groups := list(self._groups)):
                self._alike_groups, self._alike_until = groups, None

    def load(self, layer: int) -> None:
        """Make the computing stream wait for the reused rows of `layer`."""
        self._give(layer, whole=True)

    def load_seen(self, layer: int) -> None:
        """See `LayerLoader.load_seen`."""
        self._give(layer, whole=self._seen_rows is None)

    def expect_narrowing(self, layer: int) -> None:
        """See `LayerLoader.expect_narrowing`. The rows of `layer` itself are copied while it is found out which ones are seen."""
        self._hold = layer

    def narrow(self, seen: Tensor) -> None:
        """See `LayerLoader.narrow`. The host doesn't wait for `seen`."""
        self._seen_rows, self._hold = seen, self._adapter.num_layers
        self._first_narrowed = self._rest = self._next
        self._begun_layers = 0
        for key in self._groups:
            self._narrow(key)

    def _give(self, layer: int, whole: bool) -> None:
        """Make the computing stream wait for the reused rows of `layer`: all of them, or those that are seen."""
        started = time.perf_counter()
        # Recorded before the host waits for the disk, because the device waits then as well.
        self._streams.asked[layer].record(self._current)
        if layer > self._hold:  # nothing was narrowed after all
            self._hold = self._adapter.num_layers
        while self._next <= layer:
            self._launch()
        # Fewer at first, when the device has little other work in the meantime.
        self._launch_up_to(layer + min(layer + 1, LAUNCH_AHEAD))
        while whole and self._rest <= min(layer + LAUNCH_AHEAD, self._next - 1):
            self._launch_rest()
        if self._next == self._adapter.num_layers and not self._streams.asked[layer].query():
            self._launch_a_rest()  # the device still computes what comes before this layer
        if self._brought:
            self._current.wait_event(self._streams.brought)
            self._brought = False
        self._current.wait_event(self._placed[layer])
        self._awaited = max(self._awaited, layer + 1)
        self._streams.given[layer].record(self._current)
        self.seconds += time.perf_counter() - started

    def start_first_layers(self) -> None:
        """See `LayerLoader.start_first_layers`. Where copying takes longer than computing, time without a copy makes the prompt later."""
        super().start_first_layers()
        layer = sum(self._row_copies.size(0, key, s.rows) for key, group in self._groups.items() for s in group)
        self._launch_up_to(min(LAUNCH_AHEAD, FIRST_BYTES // max(1, layer)), alone=True)

    def bring(self) -> None:
        """See `LayerLoader.bring`. A further layer is queued when the last but one is in its place."""
        while self._next < self._adapter.num_layers and self._slow.ready(self._next):
            # Also where the ring has more pieces: copies for others would wait behind these, and this thread for room.
            if len(self._queued) > 1 and not self._queued[-2].query():
                return
            if not self._streams.staging.is_free(self._next % self._on_device.pieces):
                return
            self._launch(alone=True)

    def take_turn(self) -> None:
        """See `LayerLoader.take_turn`."""
        if self._made is None:
            return
        self._current = torch.cuda.current_stream(self._adapter.device)
        # What was queued on the placing stream since then are rows, and `load` waits for those of each layer.
        self._current.wait_event(self._made)
        self._buffers.used_on(self._current)

    def start(self) -> None:
        """See `LayerLoader.start`."""
        started = time.perf_counter()
        self._slow.read_on(self._next)
        self._launch_up_to(self._next)
        self._launch_a_rest()
        self.seconds += time.perf_counter() - started

    def waited(self) -> float:
        """Seconds that the computing stream waited for rows, by the device's clock. Call it when that stream is done. Of each layer, only
        the last `load` counts.
        """
        pairs = zip(self._streams.asked, self._streams.given, strict=True)
        return sum(asked.elapsed_time(given) for asked, given in pairs) / 1e3

    @property
    def staged(self) -> bool:
        """Whether rows went through staging memory, instead of being read where they lie."""
        return self._on_device.staged

    def copy_deviations(self, pieces: Sequence[tuple[int, Tensor]], layers: int) -> Tensor:
        """See `LayerLoader.copy_deviations`. The copy comes after the rows that are queued already, and the next `load` waits for it.

        Page-locked pieces are copied one by one. Making one table of them would take the host milliseconds, in which the device has
        nothing to do.
        """
        streams, device, columns = self._streams, self._adapter.device, self._columns(layers)
        if self._copies is not None and all(numbers.is_pinned() and numbers.is_contiguous() for _, numbers in pieces):
            first = pieces[0][1]
            with torch.cuda.stream(streams.copy):
                whole = torch.zeros(self._buffers.length, first.shape[1], dtype=first.dtype, device=device)
                for start, numbers in pieces:
                    self._copies.collect(whole[start].data_ptr(), numbers.data_ptr(), numbers.nbytes)
                self._copies.queue(streams.copy.cuda_stream)
                there = self._own_columns(whole[:, :columns]).contiguous()
        else:
            host = self._table(pieces, columns)
            with torch.cuda.stream(streams.copy):
                there = self._own_columns(host.to(device, non_blocking=True))
            self._held.append(host)
        streams.brought.record(streams.copy)
        there.record_stream(self._current)
        self._held.append(there)
        self._brought = True
        return there

    def close(self) -> None:
        """See `LayerLoader.close`. Work under way on the device ends before the computing stream goes on."""
        super().close()
        # Its turn never came: nobody waits on the device for what reads the chunks' memory.
        if self._current == self._streams.place:
            self._streams.copy.synchronize()
        if self._awaited < self._next or self._rest < self._adapter.num_layers or self._brought:
            self._current.wait_stream(self._streams.copy)
            self._current.wait_stream(self._streams.place)

    def _launch_up_to(self, layer: int, *, alone: bool = False) -> None:
        """Queue the layers up to this one, as far as their rows are there already, each `alone` or with some that follow it."""
        while self._next <= min(layer, self._hold, self._adapter.num_layers - 1) and self._slow.ready(self._next):
            self._launch(alone=alone)

    def _launch_a_rest(self) -> None:
        """Queue some second parts, if there is room without waiting.

        No more at once: the rows of a short prompt are copied in less time than the host takes to queue the copies, so there is always room, and what computes
        would wait until the second parts of all layers are queued.
        """
        if self._rest < self._next and (len(self._queued) < QUEUED or self._queued[0].query()):
            self._launch_rest()

    def _launch(self, *, alone: bool = False) -> None:
        """Queue the next layer, `alone` or with some that follow it: all of it, or the rows that are seen. Waits for rows on disk, and until few enough
        layers are queued."""
        whole = self._next < self._first_narrowed
        most = 1 if alone else self._together(self._begun_layers)
        end = self._next + most
        if most > 1:
            end = min(end, self._alike_end(self._next), max(self._next, self._hold) + 1)
        layers = range(self._next, min(end, self._first_narrowed) if whole else end)
        self._queue(layers, WHOLE if whole else SEEN)
        for layer in layers:
            self._loaded[layer] = 1
        self._next = layers.stop
        self._begun_layers += len(layers)

    def _launch_rest(self) -> None:
        """Queue the second part of the next layer that has one, with those of some that follow it."""
        end = self._rest + self._together(self._begun_rests)
        if end > self._rest + 1:
            end = min(end, self._alike_end(self._rest), self._next)
        layers = range(self._rest, end)
        self._queue(layers, REST)
        self._rest = layers.stop
        self._begun_rests += len(layers)

    def _alike_end(self, layer: int) -> int:
        """The first layer behind `layer` that can't be queued together with it."""
        if self._on_device.pieces == LEAST_PIECES:
            return layer + 1
        if self._alike_until is None:
            forms = [self._forms(key) for key in self._groups]
            self._alike_until = self._kernels.alike_until(forms, self._buffers, self._tables)
        return self._alike_until[layer]

    def _together(self, begun: int) -> int:
        """How many layers may be queued together, where `begun` layers were queued before them.

        The first ones are queued singly, so that the computation can begin soon, and then no more at once than are queued already, so that it need not wait.
        Together they take half of the ring at most: while they are placed, the next ones are copied.
        """
        if self._slow:  # the rows of each layer may have to be waited for
            return 1
        return max(1, min(begun, self._on_device.pieces // 2))

    def _queue(self, layers: range, part: str) -> None:
        """Queue copies of the rows of some layers, and the work that makes keys and values of them. Several are `RowKernels.alike_until`."""
        streams = self._streams
        if len(self._queued) == QUEUED:
            self._queued[0].synchronize()
        pieces = [layer % self._on_device.pieces for layer in layers]
        streams.staging.await_free(pieces)
        self._row_copies.begin()
        for key in self._groups:
            self._on_device.prepare(key)
        narrowed = {key: None if part == WHOLE else self._narrow(key) for key in self._groups}
        for layer in layers:
            slow = iter(self._slow.take(layer) if part != REST else ())
            for key, group in self._groups.items():
                if (some := narrowed[key]) is None or part == REST or not all(some.apart):
                    self._row_copies.collect(layer, key, group, slow, some, part)
        if part == SEEN:
            self._row_copies.gather(layers, narrowed)
        self._row_copies.queue()
        copied, placed = streams.copied[layers[-1]], streams.placed[layers[-1]]
        copied.record(streams.copy)
        streams.place.wait_event(copied)
        if self._groups:
            with torch.cuda.stream(streams.place):
                for layer in layers:
                    self._buffers.await_layer(layer)
                for key in self._groups:
                    self._place(layers, key, narrowed[key], part)
        placed.record(streams.place)
        for layer in layers:
            self._placed[layer] = placed
        streams.staging.used(pieces, placed)
        self._queued.append(placed)

    def _narrow(self, key: tuple[str, str]) -> Narrowed | None:
        """Which rows of a group belong to which part. None: all come in the first one."""
        assert self._seen_rows is not None
        return self._on_device.narrow(key, self._seen_rows, self._first_narrowed, self._current)

    def _place(self, layers: range, key: tuple[str, str], narrowed: Narrowed | None, part: str) -> None:
        """Decode, rotate and place a group's rows: by the kernel where that is exact, else by the codec's and the model's own code."""
        group = self._on_device.prepare(key)
        if part == REST and narrowed is None:
            return
        if self._kernels.can_place(key, layers):
            self._kernels.place(
                layers,
                key,
                self._row_format(layers.start, key),
                self._buffers,
                self._tables,
                bases=group.bases[layers.start : layers.stop],
                where=group.where if narrowed is None else narrowed.where,
                places=group.places if narrowed is None else narrowed.places,
                split=None if narrowed is None else narrowed.split,
                rest=part == REST,
            )
            return
        for layer in layers:
            form = self._row_format(layer, key)
            size = sum(form.span(source.rows) for source in self._groups[key])
            stage = self._on_device.stage(layer, key)
            assert stage is not None
            self._place_rows(layer, key, stage[:size], self._part(key, WHOLE))

    def _places_of(self, key: tuple[str, str], places: Sequence[NDArray[np.int64]]) -> Tensor:
        return self._on_device.prepare(key).places  # there already: another copy would wait for all that is queued
