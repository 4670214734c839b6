"""Where a prompt's rows are on the device and where they go there, for the kernels and copies that load them.

Chunks that are stored alike, with one codec and dtype, are a group: their rows are staged, decoded and placed together. Group by group, one
table on the device says in which memory each chunk's rows of a layer lie, and to which places of the prompt they go.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cachetune_rag.kernels import rows_of
from cachetune_rag.model import ModelAdapter
from cachetune_rag.reuse.row_kernels import RowKernels
from cachetune_rag.reuse.source import Source
from cachetune_rag.reuse.staging import LEAST_PIECES, MOST_PIECES, Piece, pieces_for
from cachetune_rag.reuse.streams import Streams
from cachetune_store import RowFormat
from cachetune_store.tier_kinds import HOST
from cachetune_store.tiers import DeviceReader


@dataclass(frozen=True)
class Group:
    """How a group of sources is loaded.

    Attributes:
        bases: int64 [layers, sources]; where each source's rows are on the device, or will be.
        addresses: the same on the host, by layer.
        where, places: of every row, as `kernels.rows.place` takes them.
        in_place: by source, whether its rows are read where they lie.
        apart: by source, whether its rows can be copied one by one: int64 [sources], 0 or 1.
    """

    bases: Tensor
    addresses: list[list[int]]
    where: Tensor
    places: Tensor
    in_place: list[bool]
    apart: Tensor


@dataclass(frozen=True)
class Narrowed:
    """How a group is loaded in two parts.

    Attributes:
        hosts: int64 [layers, sources]; where the rows of sources are in page-locked memory that come in two parts, 0 for others.
        addresses: the same on the host, by layer; 0 in layers before the first one that comes in two parts.
        where, places: as of `Group`, with the rows of the first part in front.
        split: int64 [1]; how many these are.
        apart: by source, whether its rows come in two parts.
    """

    hosts: Tensor
    addresses: list[list[int]]
    where: Tensor
    places: Tensor
    split: Tensor
    apart: list[bool]


class DeviceGroups:
    """Makes the tables of a prompt's groups, each when it is first needed, and takes the memory that rows are staged in.

    Args:
        adapter: the model.
        streams: on which the tables are copied and used.
        kernels: say which rows they can place.
        by_address: whether rows in host memory can be copied by their addresses.
        forms: gives how a group's rows lie in every layer.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        streams: Streams,
        kernels: RowKernels,
        *,
        by_address: bool,
        forms: Callable[[tuple[str, str]], list[RowFormat]],
    ):
        self._adapter, self._streams, self._kernels = adapter, streams, kernels
        self._by_address, self._forms = by_address, forms
        self._sources: Mapping[tuple[str, str], Sequence[Source]] = {}
        self._prepared: dict[tuple[str, str], Group] = {}
        self._narrowed: dict[tuple[str, str], Narrowed | None] = {}
        self._pieces: int | None = None
        self._stages: list[dict[tuple[str, str], Piece]] = [{} for _ in range(MOST_PIECES)]
        # Addresses of a source's layers, from the first one in two parts on, by the source's place in the prompt.
        self._hosts: dict[int, list[int]] = {}
        self._held: list[Tensor] = []  # memory that queued work still reads

    @property
    def staged(self) -> bool:
        """Whether rows went through staging memory, instead of being read where they lie."""
        return any(self._stages)

    def set_sources(self, sources: Mapping[tuple[str, str], Sequence[Source]]) -> None:
        """The groups, and the sources in each: whatever was found out of others holds no more."""
        self._sources = sources
        self._prepared, self._narrowed, self._pieces = {}, {}, None

    @property
    def pieces(self) -> int:
        """How many pieces the ring has in which layers are staged in turns: more than two where several may be placed together, because their rows are
        moved by kernels and are few bytes."""
        if self._pieces is None:
            layers = range(self._adapter.num_layers)
            by_kernel = self._by_address and all(self._kernels.can_place(key, layers) for key in self._sources)
            self._pieces = pieces_for(sum(map(self._layer_bytes, self._sources))) if by_kernel else LEAST_PIECES
        return self._pieces

    def _layer_bytes(self, key: tuple[str, str]) -> int:
        """Bytes that the rows of a group's largest layer take."""
        return max(
            sum(form.span(source.rows) for source in self._sources[key])
            for form in _different(self._forms(key)).values()
        )

    def stage(self, layer: int, key: tuple[str, str]) -> Tensor | None:
        """The staging memory of a group for a layer; None if none was needed so far."""
        piece = self._stages[layer % self.pieces].get(key)
        return None if piece is None else piece.memory

    def prepare(self, key: tuple[str, str]) -> Group:
        """How a group is loaded. The first time, its staging memory is taken, and its table copied to the device."""
        if (known := self._prepared.get(key)) is not None:
            return known
        group, device, forms = self._sources[key], self._adapter.device, self._forms(key)
        by_kernel = self._kernels.can_place(key, range(len(forms)))
        in_place = [
            isinstance(source.reader, DeviceReader) and source.reader.device == device and by_kernel for source in group
        ]
        # Every part of the table begins at a multiple of 16 bytes: kernels are compiled for that.
        bases = np.zeros((len(forms), len(group) + len(group) % 2), np.int64)
        staged = [index for index, here in enumerate(in_place) if not here]
        if staged:
            different = _different(forms).items()
            ends = {name: np.cumsum([0, *(form.span(group[i].rows) for i in staged)]) for name, form in different}
            room = max(int(sums[-1]) for sums in ends.values())
            stages = [piece.memory.data_ptr() for piece in self._take(key, room)]
            for layer, form in enumerate(forms):
                bases[layer, staged] = stages[layer % len(stages)] + ends[id(form)][:-1]
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
        made = self._prepared[key] = Group(
            there[: bases.size].view(bases.shape),
            bases.tolist(),
            there[start : start + count],
            there[there.shape[0] - count :],
            in_place,
            there[bases.size : start],
        )
        return made

    def narrow(self, key: tuple[str, str], seen: Tensor, first: int, current: torch.cuda.Stream) -> Narrowed | None:
        """Find out, on the device, which rows of a group belong to which part. None: all come in the first one.

        Args:
            key: the group.
            seen: bool [length] on the device; true at the places of rows that come first. The host doesn't wait for it.
            first: the first layer that is loaded in two parts. It is the same for all groups.
            current: the stream that computes.
        """
        if key in self._narrowed:
            return self._narrowed[key]
        sources, group, device = self._sources[key], self.prepare(key), self._adapter.device
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
        streams = self._streams
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
            first_part = seen[group.places]
            if not all(apart):
                first_part |= group.apart[group.where >> 32] == 0
            order = first_part.to(torch.uint8).sort(descending=True, stable=True).indices
            made = Narrowed(
                there.view(hosts.shape), hosts.tolist(), group.where[order], group.places[order],
                first_part.sum().view(1), apart,
            )  # fmt: skip
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
        sources = self._sources[key]
        if not self._by_address or not self._kernels.can_place(key, range(self._adapter.num_layers)):
            return [0] * len(sources)
        return [int(source.reader.kind is HOST and source.reader.page_locked) for source in sources]

    def _take(self, key: tuple[str, str], size: int) -> list[Piece]:
        """The pieces of the ring, each of at least `size` bytes. Another one is taken only if the one at hand is too small."""
        numbers = range(self.pieces)
        few = [
            number for number in numbers if key not in (mine := self._stages[number]) or mine[key].memory.numel() < size
        ]
        if few:
            for number in few:
                self._stages[number].pop(key, None)  # freed first, if no other prompt has it
            for number, piece in zip(few, self._streams.staging.take(few, key, size), strict=True):
                self._stages[number][key] = piece
        return [self._stages[number][key] for number in numbers]


def _different(forms: Sequence[RowFormat]) -> dict[int, RowFormat]:
    """The formats of a group's layers, each once. By identity, as layers share their formats: hashing them would take longer than what is done with them."""
    return {id(form): form for form in forms}
