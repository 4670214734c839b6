"""Host memory for rows: page-aligned, so that files can be read into it without a copy."""

from __future__ import annotations

import mmap
import threading
import weakref

import numpy as np
import torch
from torch import Tensor

__all__ = ["PAGE", "SlabPool", "memory_of", "private_pages", "round_up"]

PAGE = 4096
"""Alignment, in bytes, of everything that is read from or written to a chunk file as a unit."""
_HUGE = 2 << 20


def round_up(count: int, unit: int = PAGE) -> int:
    """The smallest multiple of `unit` that is not below `count`."""
    return -(-count // unit) * unit


def memory_of(tensor: Tensor) -> memoryview:
    """The writable bytes of a contiguous uint8 CPU tensor, without a copy."""
    return memoryview(tensor.numpy().data)


class SlabPool:
    """Gives out page-aligned host memory, and keeps what comes back for the next one who asks.

    Memory that is new to the process costs more to touch than a disk costs to fill it. Pinned memory comes from torch,
    which keeps it for reuse itself (and knows when copies to a GPU are done with it).

    Args:
        pinned: whether to give out page-locked memory.
        limit: bytes kept at most while nobody uses them (unless pinned).
    """

    def __init__(self, *, pinned: bool, limit: int) -> None:
        self.pinned = pinned
        self._limit = limit
        self._idle: dict[int, list[mmap.mmap]] = {}
        self._idle_bytes = 0
        # Reentrant, because memory may come back while the collector runs inside allocate().
        self._lock = threading.RLock()

    def allocate(self, count: int) -> Tensor:
        """A uint8 tensor of `count` bytes that begins on a page; contents are arbitrary."""
        if self.pinned:
            raw = torch.empty(count, dtype=torch.uint8, pin_memory=True)
            if raw.data_ptr() % PAGE == 0:
                return raw
            raw = torch.empty(count + PAGE, dtype=torch.uint8, pin_memory=True)
            start = -raw.data_ptr() % PAGE
            return raw[start : start + count]
        size = self.size_of(count)
        area = self._take(size) or private_pages(size)
        array = np.frombuffer(area, dtype=np.uint8)
        # The array lives as long as any view of the tensor does.
        weakref.finalize(array, self._give_back, area, size).atexit = False
        return torch.from_numpy(array)[:count]

    def size_of(self, count: int) -> int:
        """Bytes that allocate() really takes for `count`: few different sizes, so that memory finds new users.

        Torch rounds pinned memory up to a power of two; here it is an eighth of one.
        """
        if self.pinned:
            return 1 << (count - 1).bit_length()
        return round_up(count, max(PAGE, 1 << max(0, count.bit_length() - 4)))

    @property
    def idle_bytes(self) -> int:
        """Bytes kept for reuse now."""
        return self._idle_bytes

    def clear(self) -> None:
        """Give idle memory back to the system, and keep none from now on."""
        with self._lock:
            self._limit = 0
            self._idle.clear()
            self._idle_bytes = 0

    def _take(self, size: int) -> mmap.mmap | None:
        with self._lock:
            areas = self._idle.get(size)
            if not areas:
                return None
            self._idle_bytes -= size
            return areas.pop()

    def _give_back(self, area: mmap.mmap, size: int) -> None:
        with self._lock:
            if size > self._limit:
                return
            # Sizes that nobody asks for any more must not crowd out the others.
            while self._idle_bytes + size > self._limit:
                other = next(key for key, areas in self._idle.items() if areas)
                self._idle[other].pop()
                self._idle_bytes -= other
            areas = self._idle.pop(size, [])
            areas.append(area)
            self._idle[size] = areas
            self._idle_bytes += size


def private_pages(size: int) -> mmap.mmap:
    """`size` bytes of zeros that begin on a page. Private: a forked process must not write into its parent's rows."""
    area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if size >= _HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
        # Far fewer page faults while the first read fills the memory.
        area.madvise(mmap.MADV_HUGEPAGE)
    return area
