"""Puts stored rows as keys and values at their places in the prompt, layer by layer.

Rows of chunks on disk are read ahead on threads while earlier layers compute. Rows in host memory are not copied before they are needed. The
rows of all chunks of the prompt are decoded, rotated to their positions and put in their places together.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cachetune_rag.concurrency.deadline import DeadlinePool
from cachetune_rag.model import KVBuffers, ModelAdapter
from cachetune_rag.model.family.rope import Tables, rows_of
from cachetune_rag.reuse.slow_rows import SlowRows, read_rows
from cachetune_rag.reuse.source import Source
from cachetune_store import ChunkReader, HeadBytes, LayerSpec, RowFormat, get_codec

WHOLE, SEEN, REST = "whole", "seen", "rest"
"""The parts in which a layer's rows are loaded: all together, or those that are wanted first (`LayerLoader.narrow`) and then the others."""


@dataclass(frozen=True)
class _Part:
    """Which rows of a group of sources are loaded together.

    Attributes:
        counts: of every source, how many.
        numbers: of every source, the numbers of its rows, int64; None for all.
        places: where they go, int64, on the device.
        tables: the rows of the rotary tables that belong to these places.
    """

    counts: list[int]
    numbers: list[Tensor | None]
    places: Tensor
    tables: dict[str | None, Tables]


class RowForms:
    """How the rows of a group of sources lie in every layer, by the group's key.

    An object of its own, not a method of the loader: what a loader has must not refer back to it. Otherwise only Python's collector
    would free the prompt's buffers, which are gigabytes of the device's memory.

    Args:
        adapter: the model.
    """

    def __init__(self, adapter: ModelAdapter):
        self._adapter, self._known = adapter, dict[tuple[str, str], list[RowFormat]]()

    def __call__(self, key: tuple[str, str]) -> list[RowFormat]:
        """The format of every layer."""
        forms = self._known.get(key)
        if forms is None:
            forms = self._known[key] = [row_format(*key, spec) for spec in self._adapter.stored_layers]
        return forms


class LayerLoader:
    """Loads the reused rows of a prompt into its buffers: each layer once, when `load` asks for it.

    After `narrow`, a layer may be loaded in two parts: `load_seen` brings the rows that are wanted first, and `load` the others.

    Args:
        adapter: the model, which rotates keys.
        sources: the reused chunks, and how many rows of each are needed.
        buffers: where the rows go.
        pool: threads that read ahead.
        forms: how rows lie, if somebody else has it already.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        sources: Sequence[Source],
        buffers: KVBuffers,
        pool: DeadlinePool,
        forms: RowForms | None = None,
    ):
        self._adapter, self._buffers = adapter, buffers
        self._tables = adapter.rotary_tables(buffers.length)
        self._loaded = [0] * adapter.num_layers
        self._forms = RowForms(adapter) if forms is None else forms
        self._slow = SlowRows(pool, adapter.num_layers)
        self.seconds = 0.0
        self._wanted: list[tuple[int, int, int]] | None = None
        self._seen: NDArray[np.bool_] | None = None
        # Of layers of which the seen rows alone were loaded, the encoded rows of sources that still have others, by their place in the prompt.
        self._begun: dict[int, dict[int, Tensor]] = {}
        self.set_sources(sources)

    def set_sources(self, sources: Sequence[Source]) -> None:
        """Change how many rows are loaded of the layers that are still to come: a selector may decide after the first layers."""
        wanted = [(id(s.reader), s.start, s.rows) for s in sources]
        if wanted == self._wanted:
            return  # what is being read ahead stays wanted
        self._wanted = wanted
        self._groups: dict[tuple[str, str], list[Source]] = {}
        for source in sources:
            if source.rows:
                layout = source.reader.layout
                self._groups.setdefault((layout.codec, layout.dtype), []).append(source)
        self._sources = [s for group in self._groups.values() for s in group]
        self._parts: dict[tuple[tuple[str, str], str], _Part] = {}
        self._slow.set_sources([s for s in self._sources if not s.reader.in_memory])

    def load(self, layer: int) -> None:
        """Put the reused rows of `layer` into the buffers. Later calls for the same layer do nothing."""
        if self._loaded[layer]:
            return
        started = time.perf_counter()
        if (begun := self._begun.pop(layer, None)) is None:
            self._load_part(layer, WHOLE, self._rows(layer))
        else:
            self._load_part(layer, REST, [begun.get(source.start) for source in self._sources])
        self._loaded[layer] = 1
        self.seconds += time.perf_counter() - started

    def expect_narrowing(self, layer: int) -> None:
        """`narrow` will be called before `load_seen(layer)`: rows of later layers need not be brought before."""

    def narrow(self, seen: Tensor) -> None:
        """Of layers that are still to come, the rows at some places are wanted before the others.

        Args:
            seen: bool [length] on the model's device; true at these places.
        """
        self._seen = seen.cpu().numpy()

    def load_seen(self, layer: int) -> None:
        """As `load`, but after `narrow` only the rows at the places that it was given need be there when this returns: `load` brings the others."""
        if self._seen is None:
            self.load(layer)
        if self._loaded[layer] or layer in self._begun:
            return
        started = time.perf_counter()
        rows = self._rows(layer)
        self._load_part(layer, SEEN, rows)
        numbers = (each for key in self._groups for each in self._part(key, SEEN).numbers)
        three = zip(self._sources, rows, numbers, strict=True)
        self._begun[layer] = {source.start: piece for source, piece, some in three if some is not None}
        self.seconds += time.perf_counter() - started

    def _load_part(self, layer: int, part: str, rows: Sequence[Tensor | None]) -> None:
        """Put some of a layer's rows into the buffers: all of them, those that are seen first, or the others.

        `rows` are the encoded rows of every source, in the order of the groups; None for a source that has none in this part.
        """
        pieces, device = iter(rows), self._adapter.device
        self._buffers.await_layer(layer)
        for key, group in self._groups.items():
            form, some = self._row_format(layer, key), self._part(key, part)
            size = sum(form.span(count) for count in some.counts)
            encoded = torch.empty(size, dtype=torch.uint8, device=device)
            at = 0
            for source, count, numbers in zip(group, some.counts, some.numbers, strict=True):
                piece = next(pieces)
                if not count or piece is None:
                    continue
                to = encoded[at : at + form.size(count)]
                if numbers is None:
                    to.copy_(piece, non_blocking=True)
                else:
                    every = piece[: form.size(source.rows)].view(-1, form.row_bytes)
                    if device.type == "cpu":
                        torch.index_select(every, 0, numbers, out=to.view(-1, form.row_bytes))
                    else:
                        to.copy_(every[numbers].view(-1), non_blocking=True)
                at += form.span(count)
            if size:
                self._place_rows(layer, key, encoded, some)

    def _part(self, key: tuple[str, str], part: str) -> _Part:
        """Which rows of a group belong to a part."""
        made = self._parts.get((key, part))
        if made is None:
            # Rows from a disk lie in blocks that are read and checked whole, and would have to be kept in memory until the others are wanted;
            # and where rows share bytes, no single one can be decoded. Such sources are loaded whole with what is seen.
            alone = not any(form.group_bytes for form in self._forms(key))
            counts: list[int] = []
            numbers: list[Tensor | None] = []
            places = []
            for source in self._groups[key]:
                at, chosen = source.places[: source.rows], None
                if part == REST and not (alone and source.reader.in_memory):
                    chosen = np.empty(0, np.int64)
                elif part != WHOLE and alone and source.reader.in_memory:
                    assert self._seen is not None
                    chosen = np.flatnonzero(self._seen[at] == (part == SEEN))
                places.append(at if chosen is None else at[chosen])
                counts.append(len(places[-1]))
                numbers.append(None if chosen is None else torch.from_numpy(chosen))
            there = self._places_of(key, places)
            made = self._parts[key, part] = _Part(counts, numbers, there, rows_of(self._tables, there))
        return made

    def is_loaded(self, layer: int) -> bool:
        """Whether the reused rows of `layer` are in the buffers, or queued for them."""
        return bool(self._loaded[layer])

    def _places_of(self, key: tuple[str, str], places: Sequence[NDArray[np.int64]]) -> Tensor:
        """The places of a group's rows, of every source, on the device."""
        return torch.from_numpy(np.concatenate(places)).to(self._adapter.device)

    def _place_rows(self, layer: int, key: tuple[str, str], encoded: Tensor, part: _Part) -> None:
        """Decode a part of a group's rows, rotate their keys to their places and put keys and values there.

        `encoded` holds the sources' rows, each source's RowFormat.span() behind the one before.
        """
        spec = self._adapter.stored_layers[layer]
        keys, values = get_codec(key[0]).decode(encoded, spec, self._adapter.dtype, part.counts)
        own = self._adapter.heads.own(self._adapter.layers[layer])
        keys, values = keys[:, own], values[:, own]
        keys = self._adapter.rotate_by(layer, keys, part.tables)
        self._buffers.key_rows[layer].index_copy_(0, part.places, keys)
        self._buffers.value_rows[layer].index_copy_(0, part.places, values)

    def start_deviations(self) -> None:
        """The deviations of all sources will be asked for: start reading those that are on disk."""
        self._slow.start_deviations()

    def deviations(self, reader: ChunkReader) -> Tensor | None:
        """The deviations of one of the open chunks; waits for them if they are on disk.

        Raises:
            DamagedSourceError, StoreTimeoutError: they can't be read.
        """
        return self._slow.deviations(reader)

    def copy_deviations(self, pieces: Sequence[tuple[int, Tensor]], layers: int) -> Tensor:
        """Copy tokens' deviations to the device: a table [prompt length, columns], complete once `load(0)` has returned.

        Args:
            pieces: the place of a piece's first token, and the deviations of its tokens as chunks store them, in host memory; in the
                order of places. Tokens in no piece get zeros.
            layers: of how many of the first layers they are wanted. The table has columns for the heads of this process.
        """
        return self._own_columns(self._table(pieces, self._columns(layers)).to(self._adapter.device))

    def _columns(self, layers: int) -> int:
        """How many columns the stored deviations of the first layers have."""
        return 2 * sum(spec.heads for spec in self._adapter.stored_layers[:layers])

    def _own_columns(self, table: Tensor) -> Tensor:
        """The columns of the heads of this process, from those of all heads."""
        heads, parts, at = self._adapter.heads, [], 0
        if not heads.shared:
            return table
        for spec, stored in zip(self._adapter.layers, self._adapter.stored_layers, strict=True):
            for _ in range(2):  # keys and values
                if at < table.shape[1]:
                    parts.append(table[:, at : at + stored.heads][:, heads.own(spec)])
                at += stored.heads
        return torch.cat(parts, 1)

    def _table(self, pieces: Sequence[tuple[int, Tensor]], columns: int) -> Tensor:
        """The first `columns` of the deviations of `copy_deviations`, for all heads; in host memory, page-locked where there is a GPU."""
        length, pinned = self._buffers.length, self._adapter.device.type == "cuda"
        table = torch.empty(length, columns, dtype=pieces[0][1].dtype, pin_memory=pinned)
        at, rows = 0, table.numpy()  # NumPy copies without waking threads
        for start, numbers in pieces:
            rows[at:start] = 0
            at = start + numbers.shape[0]
            rows[start:at] = numbers.numpy()[:, :columns]
        rows[at:] = 0
        return table

    def start_first_layers(self) -> None:
        """Start reading the first layers, with all of their rows, before it is known which rows are needed."""
        self._slow.read_on(0)

    def bring(self) -> None:
        """Have rows brought that are in memory, before it is this prompt's turn to compute. Called again and again meanwhile: each time a
        little is queued, so that copies for others don't have to wait for many of these. (Nothing to do where rows aren't copied.)"""

    def take_turn(self) -> None:
        """The prompts before are done: the current stream computes from now on."""

    def settle(self) -> None:
        """Wait until all rows that have to be read from disk were read, so that nothing that follows waits for it or fails because of it.

        They take as much host memory until they are loaded. `set_sources` with other rows drops them.

        Raises:
            DamagedSourceError, StoreTimeoutError: they can't be read.
        """
        self._slow.settle()

    def start(self) -> None:
        """The sources are final: start slow work now, before the first `load`."""

    def _row_format(self, layer: int, key: tuple[str, str]) -> RowFormat:
        """How a group's encoded rows lie."""
        return self._forms(key)[layer]

    def _rows(self, layer: int) -> list[Tensor]:
        """Encoded rows of every source, in the order of the groups."""
        slow = iter(self._slow.take(layer))
        return [read_rows(s, layer) if s.reader.in_memory else next(slow) for s in self._sources]

    def sources_are_final(self, when_read: Callable[[], None]) -> None:
        """The sources will not change any more.

        `when_read()` is called once the last of their rows were read from disk, so that the disk is free for other readers: at once
        or later, on any thread. It is not called if the loader is closed before.
        """
        self._slow.sources_are_final(when_read)

    def close(self) -> None:
        """The prompt is done or given up. When this returns, nothing reads or writes for it any more."""
        self._slow.close()


@lru_cache(maxsize=256)
def row_format(codec: str, dtype: str, spec: LayerSpec) -> RowFormat:
    """How rows of a layer of this shape lie, as `codec` writes them."""
    return get_codec(codec).row_format(spec, dtype)


@lru_cache(maxsize=256)
def head_bytes(codec: str, dtype: str, spec: LayerSpec, first: int, count: int) -> HeadBytes:
    """Where `count` heads from `first` on lie in the rows of a layer of this shape, as `codec` writes them."""
    return get_codec(codec).head_bytes(spec, dtype, slice(first, first + count))
