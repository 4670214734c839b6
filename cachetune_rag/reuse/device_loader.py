"""Loading onto a CUDA device, while the model computes.

One stream copies a layer's encoded rows into a ring of staging buffers. Another stream decodes and rotates them and puts them into the
prompt's buffers, layer after layer. Rows of the device tier are decoded where they lie, without a copy. The stream that computes waits
for the event of the layer that it needs, and for nothing else. The prompt's buffers hold every layer, so the two loading streams never
wait for the computation, only for the disk.

Where other processes have some of the model's heads, the bytes of this one's heads alone are copied, to where they lie in the row: so decoding is
the same, and the other bytes of the staging buffers mean nothing.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cachetune_rag.concurrency.deadline import DeadlinePool
from cachetune_rag.kernels import CODECS, kernels_run_on, rows_of
from cachetune_rag.model import KVBuffers, ModelAdapter
from cachetune_rag.model.libraries.private import copy_all
from cachetune_rag.reuse.host_copies import copied_bytes, host_copies
from cachetune_rag.reuse.layer_loader import REST, SEEN, WHOLE, LayerLoader, head_bytes, row_format
from cachetune_rag.reuse.source import Source
from cachetune_store import HeadBytes
from cachetune_store.tier_kinds import HOST
from cachetune_store.tiers import DeviceReader

STAGES = 2
"""Staging buffers: while one is decoded, the next is copied into."""
LAUNCH_AHEAD = 2
"""Layers queued beyond the one that is asked for, so that the copy engine always has work. Few, because queuing takes the host time, in
which the device waits for its next piece of work."""
QUEUED = 3
"""Layers whose copies may be queued at once. A copy for somebody else, such as the inputs of a server's next decoding step, waits behind
all of them: with all layers of a long prompt queued, for tens of milliseconds."""
FIRST_BYTES = 48 << 20
"""Bytes that are queued before a selector looks at layers: about as much as is copied to an H100 while it gets ready."""


class Streams:
    """The streams and events beside the stream that computes. Made once, and used by one request after another."""

    def __init__(self, device: torch.device, layers: int):
        # A few programs copy single rows on it. They should not wait until a large kernel leaves a multiprocessor.
        self.copy = torch.cuda.Stream(device, priority=-1)
        # Placing rows is short, and the computation waits for it: it goes before all other work that is ready to run.
        self.place = torch.cuda.Stream(device, priority=-1)
        self.copied = [torch.cuda.Event() for _ in range(layers)]
        self.brought = torch.cuda.Event()
        self.prepared = torch.cuda.Event()
        self.narrowed = torch.cuda.Event()
        self.placed = [torch.cuda.Event() for _ in range(layers)]
        # Recorded on the stream that computes, before and after its wait for a layer.
        self.asked = [torch.cuda.Event(enable_timing=True) for _ in range(layers)]
        self.given = [torch.cuda.Event(enable_timing=True) for _ in range(layers)]


def warm_up(adapter: ModelAdapter, codec: str) -> None:
    """Compile the kernel that puts rows of `codec` into their places, for all shapes of layers."""
    if codec not in CODECS or not adapter.cuda_kernels:
        return
    from cachetune_rag.kernels.rows import gather, place

    tables, buffers = adapter.rotary_tables(1), adapter.new_buffers(1)
    dtype, done = str(adapter.dtype).removeprefix("torch."), set()
    for layer, spec in enumerate(adapter.layers):
        cos, sin = adapter.rotation(layer, tables)
        shape = spec, cos is None
        if shape in done or not adapter.half_split[layer]:
            continue
        done.add(shape)
        stored, own = adapter.stored_layers[layer], adapter.heads.own(spec)
        form = row_format(codec, dtype, stored)
        row = torch.zeros(form.span(1), dtype=torch.uint8, device=adapter.device)
        bases = torch.tensor([row.data_ptr(), 0], device=adapter.device)
        nothing = torch.zeros(2, dtype=torch.int64, device=adapter.device)
        rows = {"row_bytes": form.row_bytes, "group_rows": form.group_rows, "group_bytes": form.group_bytes}
        for part in (None, False, True):
            split = None if part is None else nothing[:1]
            if part is False:
                mine = (
                    head_bytes(codec, dtype, stored, own.start, own.stop - own.start) if adapter.heads.shared else None
                )
                gather(nothing, bases, nothing, nothing[:1], wanted=mine, **rows)
            place(
                bases, nothing, nothing, cos, sin, buffers.key_rows[layer], buffers.value_rows[layer], codec=codec,
                aligned=not (form.row_bytes % 16 or form.group_bytes % 16),
                stored_heads=stored.heads, first_head=own.start, split=split, rest=bool(part), **rows,
            )  # fmt: skip
    torch.cuda.synchronize(adapter.device)


@dataclass(frozen=True)
class _Group:
    """How a group of sources is loaded.

    Attributes:
        bases: int64 [layers, sources]; where each source's rows are on the device, or will be.
        where, places: of every row, as `kernels.rows.place` takes them.
        in_place: by source, whether its rows are read where they lie.
        apart: by source, whether its rows can be copied one by one: int64 [sources], 0 or 1.
    """

    bases: Tensor
    where: Tensor
    places: Tensor
    in_place: list[bool]
    apart: Tensor


@dataclass(frozen=True)
class _Narrowed:
    """How a group is loaded in two parts.

    Attributes:
        hosts: int64 [layers, sources]; where the rows of sources are in page-locked memory that come in two parts, 0 for others.
        where, places: as of `_Group`, with the rows of the first part in front.
        split: int64 [1]; how many these are.
        apart: by source, whether its rows come in two parts.
    """

    hosts: Tensor
    where: Tensor
    places: Tensor
    split: Tensor
    apart: list[bool]


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
        self._stages: list[dict[tuple[str, str], Tensor]] = [{} for _ in range(STAGES)]
        self._slots: list[torch.cuda.Event | None] = [
            None
        ] * STAGES  # recorded when the last rows in this staging buffer are placed
        self._queued: deque[torch.cuda.Event] = deque(
            maxlen=QUEUED
        )  # recorded when the rows that were queued last are placed
        self._prepared: dict[tuple[str, str], _Group] = {}
        self._narrowed: dict[tuple[str, str], _Narrowed | None] = {}
        self._hosts: dict[
            int, list[int]
        ] = {}  # addresses of a source's layers from `_rest` on, by its place in the prompt
        self._next = 0
        self._hold = adapter.num_layers  # nothing is queued behind this layer before it is asked for
        self._seen_rows: Tensor | None = None
        self._first_narrowed = self._rest = (
            adapter.num_layers
        )  # the first layer in two parts; the next one of which the second part is queued
        self._brought = False
        self._awaited = 0  # so many of the first layers the computing stream waits for, in its order
        self._kernel = kernels_run_on(adapter.device)
        self._copies = host_copies()
        self._held: list[Tensor] = []  # memory that queued work still reads
        # The same of rows from disks, of which torch doesn't know that they are being copied; by layer that was queued.
        self._copied: deque[list[Tensor]] = deque(maxlen=QUEUED)
        super().__init__(adapter, sources, buffers, pool)
        # Work that was queued on the computing stream before may still use the buffers' memory. (If they were made on the placing stream,
        # it may not, and this waits for nothing.)
        streams.place.wait_stream(self._current)
        self._made = streams.place.record_event() if self._current == streams.place else None

    def set_sources(self, sources: Sequence[Source]) -> None:
        """See `LayerLoader.set_sources`."""
        before = self._wanted
        super().set_sources(sources)
        if self._wanted is not before:
            self._prepared, self._narrowed = {}, {}

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
        while whole and self._rest <= layer:
            self._launch_rest()
        # Fewer at first, when the device has little other work in the meantime.
        self._launch_up_to(layer + min(layer + 1, LAUNCH_AHEAD))
        if self._next == self._adapter.num_layers:
            self._launch_rests()
        if self._brought:
            self._current.wait_event(self._streams.brought)
            self._brought = False
        self._current.wait_event(self._streams.placed[layer])
        self._awaited = max(self._awaited, layer + 1)
        self._streams.given[layer].record(self._current)
        self.seconds += time.perf_counter() - started

    def start_first_layers(self) -> None:
        """See `LayerLoader.start_first_layers`. Where copying takes longer than computing, time without a copy makes the prompt later."""
        super().start_first_layers()
        layer = sum(self._copied_bytes(0, key, s.rows) for key, group in self._groups.items() for s in group)
        self._launch_up_to(min(LAUNCH_AHEAD, FIRST_BYTES // max(1, layer)))

    def bring(self) -> None:
        """See `LayerLoader.bring`. A further layer is queued when the last but one is in its place."""
        while self._next < self._adapter.num_layers and self._ready(self._next):
            if (used := self._slots[self._next % STAGES]) is not None and not used.query():
                return
            self._launch()

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
        if self._slow:
            self._read_on(self._next)
        self._launch_up_to(self._next)
        self._launch_rests()
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
        return any(self._stages)

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
        if (
            self._current == self._streams.place
        ):  # its turn never came: nobody waits on the device for what reads the chunks' memory
            self._streams.copy.synchronize()
        if self._awaited < self._next or self._rest < self._adapter.num_layers or self._brought:
            self._current.wait_stream(self._streams.copy)
            self._current.wait_stream(self._streams.place)

    def _launch_up_to(self, layer: int) -> None:
        """Queue the layers up to this one, as far as their rows are there already."""
        while self._next <= min(layer, self._hold, self._adapter.num_layers - 1) and self._ready(self._next):
            self._launch()

    def _launch_rests(self) -> None:
        """Queue second parts of layers, as far as there is room without waiting."""
        while self._rest < self._next and (len(self._queued) < QUEUED or self._queued[0].query()):
            self._launch_rest()

    def _launch(self) -> None:
        """Queue the next layer: all of it, or the rows that are seen. Waits for rows on disk, and until few enough layers are queued."""
        layer = self._next
        self._queue(layer, WHOLE if layer < self._first_narrowed else SEEN)
        self._loaded[layer] = 1
        self._next += 1

    def _launch_rest(self) -> None:
        """Queue the second part of the next layer that has one."""
        self._queue(self._rest, REST)
        self._rest += 1

    def _queue(self, layer: int, part: str) -> None:
        """Queue copies of a layer's rows, and the work that makes keys and values of them."""
        streams, slot = self._streams, layer % STAGES
        if len(self._queued) == QUEUED:
            self._queued[0].synchronize()
        if (used := self._slots[slot]) is not None:
            streams.copy.wait_event(used)
        slow = iter(self._slow_rows(layer) if part != REST else ())
        self._copied.append([])
        for key, group in self._groups.items():
            self._prepare(key)
            narrowed = None if part == WHOLE else self._narrow(key)
            self._copy_rows(layer, key, group, slow, narrowed, part)
            if narrowed is not None and part == SEEN:
                self._gather(layer, key, narrowed)
        if self._copies is not None:
            self._copies.queue(streams.copy.cuda_stream)
        streams.copied[layer].record(streams.copy)
        streams.place.wait_event(streams.copied[layer])
        if self._groups:
            with torch.cuda.stream(streams.place):
                for key in self._groups:
                    self._place(layer, key, part)
        placed = streams.placed[layer]
        placed.record(streams.place)
        self._slots[slot] = placed
        self._queued.append(placed)

    def _copy_rows(
        self,
        layer: int,
        key: tuple[str, str],
        group: Sequence[Source],
        slow: Iterator[Tensor],
        narrowed: _Narrowed | None,
        part: str,
    ) -> None:
        """Queue the copies of a group's rows into its staging memory. Rows that the kernel reads where they lie are only counted, and sources that
        come in two parts are left out of the first one, of which single rows are gathered."""
        form, stage = self._row_format(layer, key), self._stages[layer % STAGES].get(key)
        mine = self._mine(layer, key)
        targets, pieces, at = [], [], 0
        apart = [False] * len(group) if narrowed is None else narrowed.apart
        with torch.cuda.stream(self._streams.copy):
            for source, in_place, later in zip(group, self._prepared[key].in_place, apart, strict=True):
                reader, count = source.reader, form.size(source.rows)
                if in_place:
                    if part != REST:
                        reader.locate(layer, source.rows)
                    continue
                assert stage is not None
                if later or part == REST:
                    if later and part == REST and self._copies is not None:
                        # All of its rows, also those that are there: gathering the others would keep multiprocessors from the recompute, while the
                        # bus has nothing else to do.
                        address = self._hosts[source.start][layer - self._first_narrowed]
                        self._copies.collect_rows(stage.data_ptr() + at, address, form, mine, source.rows)
                    at += form.span(source.rows)
                    continue
                to = stage.data_ptr() + at
                if self._copies is not None and reader.kind is HOST:
                    address = reader.locate(layer, source.rows)
                    self._copies.collect_rows(to, address, form, mine if reader.page_locked else None, source.rows)
                else:
                    piece = reader.read(layer, source.rows) if reader.in_memory else next(slow)
                    if self._copies is not None and mine is not None and piece.is_pinned():
                        self._copies.collect_rows(to, piece.data_ptr(), form, mine, source.rows)
                        self._copied[-1].append(piece)
                    else:
                        pieces.append(piece)
                        targets.append(stage[at : at + count])
                at += form.span(source.rows)
            if pieces:
                copy_all(targets, pieces, non_blocking=True)

    def _gather(self, layer: int, key: tuple[str, str], narrowed: _Narrowed) -> None:
        """Queue the copies of the rows of a group that are seen first into its staging memory."""
        from cachetune_rag.kernels.rows import gather

        form, group = self._row_format(layer, key), self._prepared[key]
        with torch.cuda.stream(self._streams.copy):
            gather(
                narrowed.hosts[layer],
                group.bases[layer],
                narrowed.where,
                narrowed.split,
                row_bytes=form.row_bytes,
                group_rows=form.group_rows,
                group_bytes=form.group_bytes,
                wanted=self._mine(layer, key),
            )

    def _mine(self, layer: int, key: tuple[str, str]) -> HeadBytes | None:
        """Where the heads of this process lie in a group's rows; None where all are here."""
        heads = self._adapter.heads
        if not heads.shared:
            return None
        own = heads.own(self._adapter.layers[layer])
        return head_bytes(*key, self._adapter.stored_layers[layer], own.start, own.stop - own.start)

    def _copied_bytes(self, layer: int, key: tuple[str, str], rows: int) -> int:
        """How many bytes of some rows of a chunk in host memory are copied."""
        return copied_bytes(self._row_format(layer, key), self._mine(layer, key), rows)

    def _narrow(self, key: tuple[str, str]) -> _Narrowed | None:
        """Find out, on the device, which rows of a group belong to which part. None: all come in the first one."""
        if key in self._narrowed:
            return self._narrowed[key]
        assert self._seen_rows is not None
        self._prepare(key)
        sources, group, device, first = (
            self._groups[key],
            self._prepared[key],
            self._adapter.device,
            self._first_narrowed,
        )
        layers = self._adapter.num_layers
        apart = [bool(each) for each in self._apart(key)]
        if first == layers or not any(apart):
            self._narrowed[key] = None
            return None
        hosts = np.zeros((layers, group.bases.shape[1]), np.int64)
        for index, source in enumerate(sources):
            if apart[index]:
                if source.start not in self._hosts:  # the rows count as read
                    self._hosts[source.start] = source.reader.locate_from(first, source.rows)
                hosts[first:, index] = self._hosts[source.start]
        # On the computing stream, which has nothing else to do until the rows are there.
        current, streams = self._current, self._streams
        current.wait_event(streams.prepared)
        group.places.record_stream(current)
        with torch.cuda.stream(current):
            here = torch.empty(hosts.size, dtype=torch.int64, pin_memory=device.type == "cuda")
            here.numpy()[:] = hosts.ravel()
            there = torch.empty(hosts.size, dtype=torch.int64, device=device)
            if device.type == "cuda":
                from cachetune_rag.kernels.rows import fetch

                fetch(here, there)
            else:
                there.copy_(here)
            first_part = self._seen_rows[group.places] | (group.apart[group.where >> 32] == 0)
            order = first_part.to(torch.uint8).sort(descending=True, stable=True).indices
            made = _Narrowed(
                there.view(hosts.shape), group.where[order], group.places[order], first_part.sum().view(1), apart
            )
            streams.narrowed.record(current)
        for stream in (streams.copy, streams.place):
            stream.wait_event(streams.narrowed)
            for each in (there, made.where, made.places, made.split):
                each.record_stream(stream)
        self._held += [here, there, made.where, made.places, made.split]
        self._narrowed[key] = made
        return made

    def _apart(self, key: tuple[str, str]) -> list[int]:
        """By source of a group, whether its rows can be copied one by one: 0 or 1."""
        sources = self._groups[key]
        if self._copies is None or not self._kernel_for(key, range(self._adapter.num_layers)):
            return [0] * len(sources)
        return [int(source.reader.kind is HOST and source.reader.page_locked) for source in sources]

    def _prepare(self, key: tuple[str, str]) -> None:
        """Make the staging memory of a group, and copy where its rows are and where they go to the device."""
        if key in self._prepared:
            return
        group, device = self._groups[key], self._adapter.device
        forms = [self._row_format(layer, key) for layer in range(self._adapter.num_layers)]
        by_kernel = self._kernel_for(key, range(len(forms)))
        in_place = [
            isinstance(source.reader, DeviceReader) and source.reader.device == device and by_kernel for source in group
        ]
        # Every part of the table begins at a multiple of 16 bytes: kernels are compiled for that.
        bases = np.zeros((len(forms), len(group) + len(group) % 2), np.int64)
        staged = [index for index, here in enumerate(in_place) if not here]
        if staged:
            # By identity, as layers share their formats: hashing the formats would take longer than the rest of this method.
            different = {id(form): form for form in forms}.items()
            ends = {name: np.cumsum([0, *(form.span(group[i].rows) for i in staged)]) for name, form in different}
            room = max(int(sums[-1]) for sums in ends.values())
            stages = [self._stage(slot, key, room).data_ptr() for slot in range(STAGES)]
            for layer, form in enumerate(forms):
                bases[layer, staged] = stages[layer % STAGES] + ends[id(form)][:-1]
        for index, source in enumerate(group):
            if in_place[index] and isinstance(source.reader, DeviceReader):
                source.reader.wait_on(self._streams.place)
                bases[:, index] = source.reader.addresses
        where = rows_of([source.rows for source in group])
        places = np.concatenate([source.places[: source.rows] for source in group])
        apart = np.zeros(bases.shape[1], np.int64)
        apart[: len(group)] = self._apart(key)
        count, even = len(where), np.zeros(len(where) % 2, np.int64)
        parts = bases.ravel(), apart, where, even, places
        host = torch.empty(sum(map(len, parts)), dtype=torch.int64, pin_memory=device.type == "cuda")
        np.concatenate(parts, out=host.numpy())  # torch would copy with all its threads
        with torch.cuda.stream(self._streams.copy):
            there = host.to(device, non_blocking=True)
        there.record_stream(self._streams.place)
        self._streams.prepared.record(self._streams.copy)
        self._held += [host, there]
        start = bases.size + apart.size
        self._prepared[key] = _Group(
            there[: bases.size].view(bases.shape),
            there[start : start + count],
            there[there.shape[0] - count :],
            in_place,
            there[bases.size : start],
        )

    def _kernel_for(self, key: tuple[str, str], layers: Sequence[int]) -> bool:
        """Whether the kernel reads a group's rows in all of `layers`."""
        codec, dtype = key
        return (
            self._kernel
            and codec in CODECS
            and dtype == str(self._adapter.dtype).removeprefix("torch.")
            and all(self._adapter.half_split[layer] for layer in layers)
        )

    def _stage(self, slot: int, key: tuple[str, str], size: int) -> Tensor:
        """Staging memory of one slot, at least `size` bytes. It is made anew only if it is too small."""
        held = self._stages[slot].get(key)
        if held is None or held.numel() < size:
            with torch.cuda.stream(self._streams.copy):
                held = torch.empty(size, dtype=torch.uint8, device=self._adapter.device)
            held.record_stream(self._streams.place)
            self._stages[slot][key] = held
        return held

    def _place(self, layer: int, key: tuple[str, str], part: str) -> None:
        """Decode, rotate and place a group's rows: by the kernel where that is exact, else by the codec's and the model's own code."""
        form, group = self._row_format(layer, key), self._prepared[key]
        narrowed = None if part == WHOLE else self._narrowed[key]
        if part == REST and narrowed is None:
            return
        if self._kernel_for(key, [layer]):
            from cachetune_rag.kernels.rows import place

            cos, sin = self._adapter.rotation(layer, self._tables)
            place(
                group.bases[layer],
                group.where if narrowed is None else narrowed.where,
                group.places if narrowed is None else narrowed.places,
                cos,
                sin,
                self._buffers.key_rows[layer],
                self._buffers.value_rows[layer],
                codec=key[0],
                row_bytes=form.row_bytes,
                group_rows=form.group_rows,
                group_bytes=form.group_bytes,
                aligned=not (form.row_bytes % 16 or form.group_bytes % 16),
                stored_heads=self._adapter.stored_layers[layer].heads,
                first_head=self._adapter.heads.own(self._adapter.layers[layer]).start,
                split=None if narrowed is None else narrowed.split,
                rest=part == REST,
            )
        else:
            size = sum(form.span(source.rows) for source in self._groups[key])
            self._place_rows(layer, key, self._stages[layer % STAGES][key][:size], self._part(key, WHOLE))

    def _places_of(self, key: tuple[str, str], places: Sequence[NDArray[np.int64]]) -> Tensor:
        return self._prepared[key].places  # there already: another copy would wait for all that is queued
