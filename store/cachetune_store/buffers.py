"""Host memory for rows: page-aligned, so that files can be read into it without a copy."""

from __future__ import annotations

import mmap
import os
import threading
import weakref
from collections import deque

import numpy as np
import torch
from torch import Tensor

from . import pinning

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


def private_pages(size: int) -> mmap.mmap:
    """`size` bytes of zeros that begin on a page. Private: a forked process must not write into its parent's rows."""
    area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if size >= _HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
        # Far fewer page faults while the first read fills the memory, and fewer pieces for the disk to fill.
        area.madvise(mmap.MADV_HUGEPAGE)
    return area


class SlabPool:
    """Gives out page-aligned host memory, and keeps what comes back for the next one who asks.

    Memory that is new to the process costs more to touch than a disk costs to fill it, and page-locking it costs more
    still. A piece comes back when no tensor sees it any more. A GPU may then still be copying from it, so page-locked
    memory is given out again only after all copies are done.

    Args:
        pinned: whether to give out page-locked memory.
        limit: bytes kept at most while nobody uses them.
    """

    def __init__(self, *, pinned: bool, limit: int) -> None:
        self.pinned = pinned
        self._limit = limit
        self._idle: dict[int, list[mmap.mmap]] = {}
        self._returned: deque[mmap.mmap] = deque()
        # Reentrant, because memory may come back while the collector runs inside a method of this pool.
        self._lock = threading.RLock()
        self._process = os.getpid()

    def allocate(self, count: int) -> Tensor:
        """A uint8 tensor of `count` bytes that begins on a page; contents are arbitrary."""
        size = self.size_of(count)
        area = self._take(size)
        if area is None:
            area = private_pages(size)
            if self.pinned and not pinning.pin(area):
                # Torch's own page-locked memory takes up to twice the bytes: it is rounded up to powers of two.
                raw = torch.empty(count + PAGE, dtype=torch.uint8, pin_memory=True)
                start = -raw.data_ptr() % PAGE
                return raw[start : start + count]
        array = np.frombuffer(area, dtype=np.uint8)
        # The array lives as long as any view of the tensor does.
        weakref.finalize(array, self._give_back, area).atexit = False
        return torch.from_numpy(array)[:count]

    def size_of(self, count: int) -> int:
        """Bytes that allocate() really takes for `count`: few different sizes, so that memory finds new users."""
        return round_up(count, max(PAGE, 1 << max(0, count.bit_length() - 4)))

    @property
    def idle_bytes(self) -> int:
        """Bytes kept for reuse now."""
        with self._lock:
            return sum(map(len, list(self._returned))) + sum(size * len(areas) for size, areas in self._idle.items())

    def prepare_idle_memory(self) -> None:
        """Make what came back ready to be given out, when the GPU has nothing to do: page-locked memory waits for it. Where the
        process uses several GPUs that is left to who asks for memory, for another one may be at work.
        """
        if self._process != os.getpid():
            return
        if self._returned and not (self.pinned and len(pinning.devices_in_use()) > 1):
            with self._lock:
                self._prepare()

    def clear(self) -> None:
        """Give idle memory back to the system, and keep none from now on."""
        with self._lock:
            self._limit = 0
            self._prepare()

    def _take(self, size: int) -> mmap.mmap | None:
        with self._lock:
            if not self._idle.get(size) and self._returned:
                self._prepare()
            areas = self._idle.get(size)
            return areas.pop() if areas else None

    def _give_back(self, area: mmap.mmap) -> None:
        # May run anywhere, in the collector. So page-locked memory only lines up here: freeing it means waiting for the
        # GPU, which is done when somebody next asks for memory. Without the lock: its holder may be waiting for a
        # CUDA graph's capture to end, and this may run inside that capture. In a process forked off since, a thread that is not there may hold it for ever.
        if self._process != os.getpid():
            return
        self._returned.append(area)
        if not self.pinned or not self._limit:
            with self._lock:
                self._prepare()

    def _prepare(self) -> None:
        """Make what came back ready to be given out, and free what is too much."""
        returned = [self._returned.popleft() for _ in range(len(self._returned))]
        if self.pinned and returned:
            pinning.wait_for_copies()
        for area in returned:
            # A size that comes back moves to the end, so the front is what nobody asks for any more.
            areas = self._idle.pop(len(area), [])
            areas.append(area)
            self._idle[len(area)] = areas
        while self.idle_bytes > self._limit:
            areas = next(areas for areas in self._idle.values() if areas)
            area = areas.pop()
            if self.pinned:
                pinning.unpin(area)
