"""Readers: an open chunk, from which rows are taken layer by layer."""

from __future__ import annotations

import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from operator import index
from types import TracebackType
from typing import ClassVar, Self

import torch
from torch import Tensor

from .chunk import Chunk, ChunkHead
from .errors import StoreArgumentError, StoreClosedError, StoreForkedError
from .keys import ChunkKey
from .layout import ChunkLayout
from .printing import shown
from .tier_kinds import HOST, TierKind

__all__ = ["ChunkReader", "HostReader"]


class ChunkReader(ABC):
    """An open chunk. It stays readable until close(), whatever is evicted or deleted meanwhile; a context manager.

    Attributes:
        kind: the kind of tier that the rows come from.
        tier: its name.
        in_memory: whether read() gives what is there, without waiting.
        device: where the rows are that read() gives.
        head: all of the chunk but its rows.
        pin: what keeps the chunk from being evicted until close().
        on_close: called once with the reader when it is closed.
        on_promote: called with the chunk to be put into the tier above; None if it wouldn't fit there.
        timed: whether its reads tell how fast the tier is. Those in the background don't: fewer threads read there, and they give way.
    """

    kind: ClassVar[TierKind]
    device = torch.device("cpu")

    def __init__(self, head: ChunkHead) -> None:
        self.head = head
        self.tier, self.in_memory = self.kind.name, self.kind.in_memory
        self.pin: object = None
        self.on_close: Callable[[ChunkReader], None] | None = None
        self.on_promote: Callable[[Chunk], bool] | None = None
        self.timed = True
        # One number for each layer, so that threads on different layers don't share a counter.
        self._bytes = [0] * len(head.layout.layers)
        self._layer_count, self._row_count = len(head.layout.layers), head.layout.tokens
        self._closed = False
        self._process = os.getpid()

    @property
    def forked(self) -> bool:
        """Whether it was opened before this process was forked off. Its memory and its locks then belong to the parent."""
        return self._process != os.getpid()

    @property
    def key(self) -> ChunkKey:
        """The chunk's key."""
        return self.head.key

    @property
    def layout(self) -> ChunkLayout:
        """Tokens, layers, dtype and codec."""
        return self.head.layout

    @property
    def order(self) -> Tensor:
        """Int64 [tokens]: row i of every layer belongs to token order[i]."""
        return self.head.order

    @property
    def scores(self) -> Tensor:
        """Float32 [tokens], by token (not by row)."""
        return self.head.scores

    @property
    def has_deviations(self) -> bool:
        """Whether the chunk has deviations: not if it has a single lead-in."""
        return self.head.has_deviations

    @property
    @abstractmethod
    def deviations(self) -> Tensor | None:
        """Float16 [tokens, columns], by token (see Chunk); None if the chunk has a single lead-in.

        Of a chunk on disk they are read when they are first asked for (see `deviations_wait`).

        Raises:
            DamagedChunkError: they fail a check. Treat the chunk as missing, and call ChunkStore.discard(key).
        """

    @property
    def deviations_wait(self) -> bool:
        """Whether `deviations` would have to wait for a disk."""
        return False

    @property
    def token_ids(self) -> Tensor:
        """Int64 [tokens]."""
        return self.head.token_ids

    @property
    def text(self) -> str | None:
        """The chunk's text, if it was stored with one."""
        return self.head.text

    @property
    def bytes_read(self) -> int:
        """Bytes of rows that read() has read so far. From disk these are whole blocks and pages, from memory only the wanted rows."""
        return sum(self._bytes)

    @property
    def seconds(self) -> float:
        """Seconds that read() has spent on reading and checking rows so far, summed over threads."""
        return 0.0

    @property
    @abstractmethod
    def host_bytes(self) -> int:
        """Bytes of host memory that the whole chunk takes."""

    @abstractmethod
    def read(self, layer: int, rows: int) -> Tensor:
        """The first `rows` rows of a layer, uint8 [bytes], as the codec wrote them. Threads may read different layers at the same time.

        Don't write to the result: it may be a view of the store's own memory.

        Raises:
            StoreArgumentError: there is no such layer, or it has fewer rows.
            DamagedChunkError: the file fails a check. Treat the chunk as missing, and call ChunkStore.discard(key).
        """

    def has(self, layer: int, rows: int) -> bool:
        """Whether `read(layer, rows)` would return without waiting for a disk."""
        layer, rows = self._check_range(layer, rows)
        return self.rows_there(layer) >= rows

    def rows_there(self, layer: int) -> int:
        """How many of a layer's first rows `read` gives without waiting for a disk."""
        self._check_range(layer, 0)
        return self.head.layout.tokens if self.in_memory else 0

    def locate(self, layer: int, rows: int) -> int:
        """The address of what `read(layer, rows)` returns, for copies by address. It counts as a read.

        The address is valid until close().
        """
        return self.read(layer, rows).data_ptr()

    def locate_from(self, layer: int, rows: int) -> list[int]:
        """`locate` of a layer and of all layers behind it."""
        return [self.locate(number, rows) for number in range(layer, self._layer_count)]

    @property
    def page_locked(self) -> bool:
        """Whether `locate` gives addresses of page-locked host memory, which a GPU can read by itself."""
        return False

    @abstractmethod
    def promote(self) -> bool:
        """Put the chunk into the tier above if there is room. Rows that were not read yet are read now. Returns whether it is in memory then."""

    def close(self) -> None:
        """Release the chunk. May be called again."""
        if not self._closed:
            self._closed = True
            self.pin = None
            if self.on_close is not None and not self.forked:
                self.on_close(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # A reader that was never closed must not keep its chunk from being evicted for ever.
        with contextlib.suppress(Exception):
            ChunkReader.close(self)

    def _check(self, layer: int, rows: int) -> tuple[int, int]:
        """Both numbers as ints, if these rows can be read."""
        # A request calls this a thousand times. So one expression tests what is usual, and only if it fails is the cause looked for.
        if (
            type(layer) is int is type(rows)
            and -1 < layer < self._layer_count
            and -1 < rows <= self._row_count
            and not self._closed
            and self._process == os.getpid()
        ):
            return layer, rows
        if self._closed:
            raise StoreClosedError(f"reader of chunk {self.key} is closed; open the chunk again")
        if self.forked:
            raise StoreForkedError(
                f"reader of chunk {self.key} was opened before this process was forked: open a store in each process"
            )
        return self._check_range(layer, rows)

    def _check_range(self, layer: int, rows: int) -> tuple[int, int]:
        layout = self.head.layout
        try:
            number, count = index(layer), index(rows)
        except TypeError:  # not whole numbers
            number = count = -1
        if not (0 <= number < len(layout.layers) and 0 <= count <= layout.tokens):
            raise StoreArgumentError(
                f"layer {shown(layer)}, rows {shown(rows)}; the chunk has layers 0 to {len(layout.layers) - 1} of "
                f"{layout.tokens} rows: use ints in these ranges"
            )
        return number, count


class HostReader(ChunkReader):
    """Rows in host memory. Every read returns a view of them."""

    kind = HOST

    def __init__(self, chunk: Chunk) -> None:
        super().__init__(chunk.head)
        self._chunk = chunk
        self._layers = chunk.layers
        self._addresses = chunk.addresses
        self._rows = chunk.head.plan.rows
        self._tokens = chunk.head.layout.tokens
        self._host_bytes = chunk.host_bytes

    @property
    def host_bytes(self) -> int:
        """See ChunkReader.host_bytes."""
        return self._host_bytes

    @property
    def deviations(self) -> Tensor | None:
        """See ChunkReader.deviations."""
        return self._chunk.deviations

    def read(self, layer: int, rows: int) -> Tensor:
        """See ChunkReader.read."""
        layer, rows = self._check(layer, rows)
        whole = self._layers[layer]
        view = whole if rows == self._tokens else whole[: self._rows[layer].size(rows)]
        self._bytes[layer] += view.numel()
        return view

    def locate(self, layer: int, rows: int) -> int:
        """See ChunkReader.locate. No view is made."""
        layer, rows = self._check(layer, rows)
        self._bytes[layer] += self._rows[layer].size(rows)
        return self._addresses[layer]

    def locate_from(self, layer: int, rows: int) -> list[int]:
        """See ChunkReader.locate_from."""
        layer, rows = self._check(layer, rows)
        for number in range(layer, self._layer_count):
            self._bytes[number] += self._rows[number].size(rows)
        return list(self._addresses[layer:])

    @property
    def page_locked(self) -> bool:
        """See ChunkReader.page_locked."""
        return self._chunk.page_locked

    def read_all(self) -> Chunk:
        """The whole chunk. The store keeps it, so it must not be written to."""
        return self._chunk

    def promote(self) -> bool:
        """See ChunkReader.promote. The tier above is the device, if the store has such a tier."""
        if self.on_promote is not None and not self._closed and not self.forked:
            self.on_promote(self._chunk)
        return True
