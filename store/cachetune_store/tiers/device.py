"""Encoded rows in a GPU's memory, where kernels read them without a copy."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .. import pinning
from ..buffers import round_up
from ..chunk import Chunk, ChunkHead, layer_views
from ..errors import BudgetError, StoreClosedError
from ..keys import ChunkKey
from ..readers import ChunkReader
from ..tier_kinds import DEVICE
from .base import Pins
from .memory import MemoryTier

__all__ = ["DeviceChunk", "DeviceReader", "DeviceTier"]

_log = logging.getLogger(__name__)
_LARGE = 2 << 20


@dataclass(frozen=True, eq=False)
class DeviceChunk:
    """A chunk's rows on a device.

    Attributes:
        slab: uint8 [plan.total], as in its file.
        deviations: as of the chunk in host memory.
        filled: recorded behind the copy that fills the slab; None where copies are done when they return (on a CPU).
    """

    head: ChunkHead
    slab: Tensor
    deviations: Tensor | None
    filled: torch.cuda.Event | None

    @cached_property
    def layers(self) -> tuple[Tensor, ...]:
        """A view of the slab for each layer. They are made once, because requests open many chunks."""
        return tuple(layer_views(self.head.layout, self.slab))

    @cached_property
    def addresses(self) -> list[int]:
        """The address at which each layer begins."""
        return [layer.data_ptr() for layer in self.layers]


class DeviceTier(MemoryTier[DeviceChunk]):
    """Copies of chunks on a device. Evicted ones are dropped, because the tiers below have them.

    Memory is taken and filled on a stream of the tier's own. It is given back behind whatever the current stream was given
    before the last reader of the chunk was closed, so that a chunk may be evicted while kernels that read it are queued.

    Args:
        budget: bytes of rows, counted as torch's allocator takes them; 0 turns the tier off.
        pins: chunks in use.
        device: a CUDA device; or the CPU, to test what uses the tier.
    """

    kind = DEVICE

    def __init__(self, budget: int, pins: Pins, device: torch.device) -> None:
        super().__init__(budget, pins)
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        # Bytes of chunks that are being copied, so that no other chunk takes their room, and those of them that were removed meanwhile.
        self._filling: dict[str, int] = {}
        self._unwanted: set[str] = set()

    def admit(self, chunk: Chunk) -> list[Chunk]:
        """See Tier. The copy may not be finished on return. Readers wait for it, on the device."""
        key, size = chunk.key, self._size(chunk.slab.numel())
        with self._lock:
            if key.digest in self._held or key.digest in self._filling:
                return []
            self._make_room(size, key)
            self._filling[key.digest] = size
        filled = None
        try:
            filled = self._copy(chunk)
        finally:
            with self._lock:
                del self._filling[key.digest]
                if filled is not None and key.digest not in self._unwanted:
                    self._hold(key, filled, size)
                    self.counters.bytes_written += chunk.slab.numel()
                self._unwanted.discard(key.digest)
        return []

    def remove(self, key: ChunkKey) -> int:
        """See Tier."""
        with self._lock:
            if key.digest in self._filling:
                self._unwanted.add(key.digest)
        return super().remove(key)

    def close(self) -> None:
        """See Tier."""
        with self._lock:
            self._unwanted.update(self._filling)
        super().close()

    def _used(self) -> int:
        return self._bytes + sum(self._filling.values())

    def _copy(self, chunk: Chunk) -> DeviceChunk:
        with contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            try:
                slab = torch.empty(chunk.slab.numel(), dtype=torch.uint8, device=self.device)
            except torch.OutOfMemoryError as error:
                _log.warning("device_budget is larger than what %s has left; chunks stay in host memory", self.device)
                raise BudgetError(
                    f"chunk {chunk.key}: {self.device} has no memory left for it; lower device_budget"
                ) from error
            # Copying from page-locked memory doesn't make the host wait. The pool reuses such memory only after all copies have ended.
            slab.copy_(chunk.slab, non_blocking=chunk.slab.is_pinned())
            filled = None
            if self._stream is not None:
                filled = torch.cuda.Event()
                filled.record(self._stream)
        return DeviceChunk(chunk.head, slab, chunk.deviations, filled)

    def _size(self, count: int) -> int:
        if self.device.type != "cuda":
            return count
        return round_up(count, _LARGE if count > _LARGE // 2 else 512)

    def _reader(self, held: DeviceChunk) -> DeviceReader:
        return DeviceReader(held, self._stream)

    def _head(self, held: DeviceChunk) -> ChunkHead:
        return held.head


class DeviceReader(ChunkReader):
    """Rows on a device. Every read returns a view of them.

    When it is closed, the current stream must come after everything that reads its rows.

    Attributes:
        addresses: where each layer begins, on the device; as for locate().
    """

    kind = DEVICE

    def __init__(self, chunk: DeviceChunk, stream: torch.cuda.Stream | None) -> None:
        super().__init__(chunk.head)
        self._layers, self.addresses = chunk.layers, chunk.addresses
        self._filled, self._deviations = chunk.filled, chunk.deviations
        self._stream = stream
        self.device = chunk.slab.device

    @property
    def host_bytes(self) -> int:
        """See ChunkReader.host_bytes."""
        return self.head.plan.total

    @property
    def deviations(self) -> Tensor | None:
        """See ChunkReader.deviations. They are in host memory."""
        return self._deviations

    def read(self, layer: int, rows: int) -> Tensor:
        """See ChunkReader.read. The rows are on the tier's device, for use on the current stream."""
        self._check(layer, rows)
        if self._stream is not None:
            self.wait_on(torch.cuda.current_stream(self.device))
        view = self._layers[layer][: self.head.plan.rows[layer].size(rows)]
        self._bytes[layer] += view.numel()
        return view

    def locate(self, layer: int, rows: int) -> int:
        """See ChunkReader.locate. The address is on the device, for use on streams that wait_on() was called with."""
        if self._closed:
            raise StoreClosedError(f"reader of chunk {self.key} is closed; open the chunk again")
        self._bytes[layer] += self.head.plan.rows[layer].size(rows)
        return self.addresses[layer]

    def wait_on(self, stream: torch.cuda.Stream) -> None:
        """Let later work on `stream` wait until the rows are there. The host doesn't wait."""
        if self._filled is not None and self._filled.query():
            self._filled = None  # the copy has ended, as it nearly always has
        if self._filled is not None:
            stream.wait_event(self._filled)

    def promote(self) -> bool:
        """True, because there is no tier above."""
        return True

    def close(self) -> None:
        """Release the chunk. Its memory is reused after the work that the current stream has now."""
        if not self._closed and self._stream is not None and not self.forked:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        self._layers = ()
        super().close()

    def __del__(self) -> None:
        # The reader was never closed, so it isn't known which streams read its rows.
        with contextlib.suppress(Exception):
            if not self._closed and self._stream is not None and not self.forked:
                pinning.wait_for_copies(self.device)
        super().__del__()
