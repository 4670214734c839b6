"""Readers: an open chunk, from which rows are taken layer by layer."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from operator import index
from types import TracebackType
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from .buffers import PAGE, SlabPool, memory_of, round_up
from .checksums import rows_checksum
from .chunk import Chunk, ChunkHead, block_ends, clear_padding, in_pool, layer_views
from .errors import DamagedChunkError, StoreArgumentError, StoreClosedError, StoreForkedError
from .keys import ChunkKey
from .layout import ChunkLayout
from .printing import shown
from .rawfile import RawFile
from .tier_kinds import DISK, HOST, TierKind

__all__ = ["ChunkReader", "DiskReader", "HostReader"]


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
    """

    kind: ClassVar[TierKind]
    device = torch.device("cpu")

    def __init__(self, head: ChunkHead) -> None:
        self.head = head
        self.tier, self.in_memory = self.kind.name, self.kind.in_memory
        self.pin: object = None
        self.on_close: Callable[[ChunkReader], None] | None = None
        self.on_promote: Callable[[Chunk], bool] | None = None
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
    def deviations(self) -> Tensor | None:
        """Float16 [tokens, columns], by token (see ChunkHead); None if the chunk has a single lead-in."""
        return self.head.deviations

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
        return self.in_memory

    def locate(self, layer: int, rows: int) -> int:
        """The address of what `read(layer, rows)` returns, for copies by address. It counts as a read.

        The address is valid until close().
        """
        return self.read(layer, rows).data_ptr()

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

    def read_all(self) -> Chunk:
        """The whole chunk. The store keeps it, so it must not be written to."""
        return self._chunk

    def promote(self) -> bool:
        """See ChunkReader.promote. The tier above is the device, if the store has such a tier."""
        if self.on_promote is not None and not self._closed and not self.forked:
            self.on_promote(self._chunk)
        return True


class DiskReader(ChunkReader):
    """Rows in a file. They are read into memory that the host tier can take over."""

    kind = DISK

    def __init__(self, head: ChunkHead, file: RawFile, rows_start: int, pool: SlabPool) -> None:
        super().__init__(head)
        self._file = file
        self._start = rows_start
        self._pool = pool
        self._covered = [0] * len(head.layout.layers)
        self._locks = [threading.Lock() for _ in head.layout.layers]
        self._memory_lock = threading.Lock()
        self._slab: Tensor | None = None
        self._promoted = False
        self._users = 0
        self._seconds = [0.0] * len(head.layout.layers)

    @property
    def seconds(self) -> float:
        """See ChunkReader.seconds."""
        return sum(self._seconds)

    @property
    def host_bytes(self) -> int:
        """See ChunkReader.host_bytes."""
        return self._pool.size_of(self.head.plan.total)

    def read(self, layer: int, rows: int) -> Tensor:
        """See ChunkReader.read. No row is read twice."""
        layer, rows = self._check(layer, rows)
        # This is kept short, because other threads wait for the interpreter meanwhile, and a prompt takes a thousand reads.
        with self._locks[layer]:
            if rows > self._covered[layer]:
                self._begin()
                try:
                    started = time.perf_counter()
                    self.fetch(layer, rows)
                    self._seconds[layer] += time.perf_counter() - started
                finally:
                    self._end()
        self._prepare()
        return self._views[layer][: self.head.plan.rows[layer].size(rows)]

    def has(self, layer: int, rows: int) -> bool:
        """See ChunkReader.has."""
        layer, rows = self._check_range(layer, rows)
        return self._covered[layer] >= rows

    @property
    def complete(self) -> bool:
        """Whether every row of every layer has been read and checked."""
        return min(self._covered) == self.head.layout.tokens

    def read_all(self) -> Chunk:
        """The whole chunk, checked.

        Raises:
            DamagedChunkError: a block fails its checksum, or the file is too short.
        """
        tokens = self.head.layout.tokens
        for layer, covered in enumerate(self._covered):
            if covered < tokens:
                self.read(layer, tokens)
        self._prepare()
        assert self._slab is not None
        return Chunk(in_pool(self.head, self._pool), self._slab, self.head.host_bytes(self._pool))

    def padding_is_clear(self) -> bool:
        """Whether the bytes between the layers are zero, as they were written. Call it only after read_all()."""
        assert self._slab is not None
        before = self._slab.numpy().copy()
        clear_padding(self.head.layout, self._slab)
        return bool(np.array_equal(before, self._slab.numpy()))

    def promote(self) -> bool:
        """See ChunkReader.promote."""
        if self.on_promote is not None and not self._promoted:
            chunk = self.read_all()
            clear_padding(self.head.layout, chunk.slab)
            self._promoted = self.on_promote(chunk)
        return self._promoted

    def close(self) -> None:
        """Release the chunk. If all of it was read, the host tier gets it."""
        if self._closed:
            return
        if self.forked:
            super().close()
            return
        try:
            if self.complete and not self._promoted:
                self.promote()
        finally:
            super().close()
            with self._memory_lock:
                self._close_file_if_unused()

    def _begin(self) -> None:
        """Keep the file open until `_end`, even if the reader is closed while the disk doesn't answer a read."""
        with self._memory_lock:
            if self._closed:
                raise StoreClosedError(f"reader of chunk {self.key} is closed; open the chunk again")
            self._users += 1

    def _end(self) -> None:
        with self._memory_lock:
            self._users -= 1
            self._close_file_if_unused()

    def _close_file_if_unused(self) -> None:
        if self._closed and not self._users:
            self._file.close()

    def _prepare(self) -> None:
        if self._slab is not None:
            return
        with self._memory_lock:
            if self._slab is None:
                slab = self._pool.allocate(self.head.plan.total)
                self._memory = memory_of(slab)
                self._views = layer_views(self.head.layout, slab)
                self._ends = block_ends(self.head.layout, self.head.block_rows)
                self._slab = slab  # set last, because threads that find it set don't take the lock

    def fetch(self, layer: int, rows: int) -> None:
        """Read rows that no `read` has brought yet, to the end of the block that holds row `rows` - 1.

        Called by `read`, which holds the layer's lock.
        """
        self._prepare()
        head, ends, offset = self.head, self._ends[layer], self.head.plan.offsets[layer]
        first, last = self._covered[layer] // head.block_rows, -(-rows // head.block_rows)
        # Direct I/O needs whole pages. So the first page may be read a second time, and its block is then checked again.
        begin, end = ends[first] // PAGE * PAGE, round_up(ends[last])
        area = self._memory[offset + begin : offset + end]
        try:
            found = self._file.read(area, self._start + offset + begin)
        except OSError as error:
            raise DamagedChunkError(f"chunk {self.key}: layer {layer} can't be read ({error.strerror})") from error
        if found != len(area):
            raise DamagedChunkError(f"chunk {self.key}: the file ends inside layer {layer}")
        while first and ends[first] > begin:
            first -= 1
        sums = head.checksums[layer].tolist()
        for block in range(first, last):
            if rows_checksum(self._memory[offset + ends[block] : offset + ends[block + 1]]) != sums[block]:
                raise DamagedChunkError(f"chunk {self.key}: checksum mismatch in layer {layer}, block {block}")
        self._covered[layer] = min(head.layout.tokens, last * head.block_rows)
        self._bytes[layer] += len(area)
