"""A reader of a chunk on disk."""

from __future__ import annotations

import threading
import time
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from .buffers import PAGE, SlabPool, memory_of, round_up
from .chunk import Chunk, block_ends, clear_padding, in_pool, layer_views
from .chunkfile import ParsedHead
from .errors import DamagedChunkError, StoreClosedError
from .read_speed import ReadSpeed
from .readers import ChunkReader
from .tier_kinds import DISK

__all__ = ["DiskReader", "OpenFile"]


class OpenFile(Protocol):
    """An open chunk file, wherever it lies. Threads may read it at the same time."""

    def read(self, area: memoryview, position: int) -> int:
        """Fill `area` from `position` on. Returns how many bytes were read."""

    def close(self) -> None:
        """Close it. May be called again."""


class DiskReader(ChunkReader):
    """Rows in a file. They are read into memory that the host tier can take over.

    Attributes:
        speed: times its reads, together with those of other chunks.
    """

    kind = DISK

    def __init__(self, parsed: ParsedHead, file: OpenFile, pool: SlabPool, scratch: SlabPool | None = None) -> None:
        """Read an open file.

        Args:
            parsed: its head.
            file: the file.
            pool: gives the memory that rows end up in.
            scratch: gives memory for deviations, and for what is read of a file that hides its rows; None: new memory each time.
        """
        head = parsed.head
        super().__init__(head)
        self._scratch = scratch or SlabPool(pinned=False, limit=0)
        self._file = file
        self._start, self._deviations_start = parsed.rows_start, parsed.deviations_start
        self._deviations = parsed.deviations
        self._deviations_lock = threading.Lock()
        self._tail_is_clear = True
        self._pool = pool
        self._covered = [0] * len(head.layout.layers)
        self._locks = [threading.Lock() for _ in head.layout.layers]
        self._memory_lock = threading.Lock()
        self._slab: Tensor | None = None
        self._promoted = False
        self._users = 0
        self._seconds = [0.0] * len(head.layout.layers)
        self.speed = ReadSpeed()

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
                count, timed = 0, self.speed.begin() if self.timed else None
                try:
                    started = time.perf_counter()
                    count = self.fetch(layer, rows)
                    self._seconds[layer] += time.perf_counter() - started
                finally:
                    if timed is not None:
                        self.speed.end(timed, count)
                    self._end()
        self._prepare()
        return self._views[layer][: self.head.plan.rows[layer].size(rows)]

    @property
    def deviations(self) -> Tensor | None:
        """See ChunkReader.deviations."""
        if self._deviations is None and self.head.has_deviations:
            with self._deviations_lock:
                if self._deviations is None:
                    self._check(0, 0)
                    self._begin()
                    try:
                        self._deviations = self._fetch_deviations()
                    finally:
                        self._end()
        return self._deviations

    @property
    def deviations_wait(self) -> bool:
        """See ChunkReader.deviations_wait."""
        return self._deviations is None and self.head.has_deviations

    def rows_there(self, layer: int) -> int:
        """See ChunkReader.rows_there."""
        layer, _ = self._check_range(layer, 0)
        return self._covered[layer]

    @property
    def complete(self) -> bool:
        """Whether every row of every layer has been read and checked."""
        return min(self._covered) == self.head.layout.tokens

    def read_all(self) -> Chunk:
        """The whole chunk, checked.

        Raises:
            DamagedChunkError: a block or the deviations fail their checksum, or the file is too short.
        """
        tokens = self.head.layout.tokens
        for layer, covered in enumerate(self._covered):
            if covered < tokens:
                self.read(layer, tokens)
        self._prepare()
        assert self._slab is not None
        spread = self.deviations
        apart = None if spread is None else in_pool(spread, self._pool)
        return Chunk(self.head, self._slab, self.head.host_bytes(self._pool), apart)

    def padding_is_clear(self) -> bool:
        """Whether the bytes behind layers and deviations are zero, as they were written. Call it only after read_all()."""
        assert self._slab is not None
        before = self._slab.numpy().copy()
        clear_padding(self.head.layout, self._slab)
        return self._tail_is_clear and bool(np.array_equal(before, self._slab.numpy()))

    def promote(self) -> bool:
        """See ChunkReader.promote."""
        if self.on_promote is not None and not self._promoted:
            chunk = self.read_all()
            clear_padding(self.head.layout, chunk.slab)
            self._promoted = self.on_promote(chunk)
        return self._promoted

    def close(self) -> None:
        """Release the chunk. If all of it was read, the host tier gets it. Nothing is read here: a disk may not answer."""
        if self._closed:
            return
        if self.forked:
            super().close()
            return
        try:
            if self.complete and not self.deviations_wait and not self._promoted:
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

    def _fetch_deviations(self) -> Tensor:
        head, size = self.head, self.head.deviations_bytes
        # Where a GPU will fetch them, into memory that it reaches by itself, and that the host tier can take over.
        memory = self._pool if self._pool.pinned else self._scratch
        area = memory_of((self._scratch if head.seal.hides else memory).allocate(round_up(size)))
        try:
            count = self._file.read(area, self._deviations_start)
        except OSError as error:
            raise DamagedChunkError(f"chunk {self.key}: its deviations can't be read ({error.strerror})") from error
        if count != len(area):
            raise DamagedChunkError(f"chunk {self.key}: the file ends inside the deviations")
        # Decrypted elsewhere, as rows are; otherwise they stay where they were read.
        clear = memory.allocate(size) if head.seal.hides else torch.from_numpy(np.frombuffer(area, np.uint8, size))
        assert head.deviations_sum is not None
        expected = head.deviations_sum.tolist()
        layer = len(head.layout.layers)
        if not head.seal.matches(
            head.key, layer, 0, area[:size], expected[0] if head.seal.words == 1 else expected, memory_of(clear)
        ):
            raise DamagedChunkError(f"chunk {self.key}: checksum mismatch in the deviations")
        self._tail_is_clear = not any(area[size:])
        return clear.view(torch.float16).view(head.layout.tokens, head.layout.deviation_columns)

    def fetch(self, layer: int, rows: int) -> int:
        """Read rows that no `read` has brought yet, to the end of the block that holds row `rows` - 1. Returns the bytes that were read.

        Called by `read`, which holds the layer's lock.
        """
        self._prepare()
        start, area = self._missing(layer, rows)
        try:
            found = self._file.read(area, start)
        except OSError as error:
            raise DamagedChunkError(f"chunk {self.key}: layer {layer} can't be read ({error.strerror})") from error
        if found != len(area):
            raise DamagedChunkError(f"chunk {self.key}: the file ends inside layer {layer}")
        self._accept(layer, rows, area)
        self._bytes[layer] += len(area)
        return len(area)

    def _missing(self, layer: int, rows: int) -> tuple[int, memoryview]:
        """Where in the file the rows of a layer begin that are still missing, and the memory that they are read into."""
        ends, offset = self._ends[layer], self.head.plan.offsets[layer]
        # Direct I/O needs whole pages. So the first page may be read a second time, and its block is then checked again.
        first, last = self._blocks(layer, rows)
        begin, end = ends[first] // PAGE * PAGE, round_up(ends[last])
        if self.head.seal.hides:
            # Not where the rows end up: others may be using those that are there already.
            return self._start + offset + begin, memory_of(self._scratch.allocate(end - begin))
        return self._start + offset + begin, self._memory[offset + begin : offset + end]

    def _blocks(self, layer: int, rows: int) -> tuple[int, int]:
        """The first block of a layer that is still missing, and the one behind that which holds row `rows` - 1."""
        return self._covered[layer] // self.head.block_rows, -(-rows // self.head.block_rows)

    def _accept(self, layer: int, rows: int, area: memoryview) -> None:
        """Check what was read of a layer into the `area` of `_missing`. From now on it counts as read.

        Raises:
            DamagedChunkError: a block fails its checksum.
        """
        head, ends, offset = self.head, self._ends[layer], self.head.plan.offsets[layer]
        first, last = self._blocks(layer, rows)
        begin = ends[first] // PAGE * PAGE
        while first and ends[first] > begin and not head.seal.hides:
            first -= 1
        sums = head.checksums[layer].tolist()
        for block in range(first, last):
            rows_of_block = self._memory[offset + ends[block] : offset + ends[block + 1]]
            found = area[ends[block] - begin : ends[block + 1] - begin] if head.seal.hides else rows_of_block
            if not head.seal.matches(head.key, layer, block, found, sums[block], rows_of_block):
                raise DamagedChunkError(f"chunk {self.key}: checksum mismatch in layer {layer}, block {block}")
        self._covered[layer] = min(head.layout.tokens, last * head.block_rows)
