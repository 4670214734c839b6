"""Host memory for rows. It is page-aligned, so that files can be read into it without a copy."""

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
"""All that is read from or written to a chunk file in one piece begins at a multiple of so many bytes."""
_HUGE = 2 << 20


def round_up(count: int, unit: int = PAGE) -> int:
    """The smallest multiple of `unit` that is not below `count`."""
    return -(-count // unit) * unit


def memory_of(tensor: Tensor) -> memoryview:
    """The writable bytes of a contiguous uint8 CPU tensor, without a copy."""
    return memoryview(tensor.numpy().data)


def private_pages(size: int) -> mmap.mmap:
    """`size` bytes of zeros that begin on a page. They are private, so that a forked process can't write into its parent's rows."""
    area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if size >= _HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
        # With huge pages, the first read causes far fewer page faults, and the disk has fewer pieces to fill.
        area.madvise(mmap.MADV_HUGEPAGE)
    return area


class SlabPool:
    """Gives out page-aligned host memory, and keeps memory that is no longer used for later calls.

    Touching new memory for the first time takes longer than filling it from a disk, and page-locking it takes longer still. Memory
    comes back when no tensor uses it any more. A GPU may still be copying from it then, so page-locked memory is given out again
    only after all copies have ended.

    Args:
        pinned: whether to give out page-locked memory.
        limit: most bytes of unused memory that are kept.
    """

    def __init__(self, *, pinned: bool, limit: int) -> None:
        self.pinned = pinned
        self._limit = limit
        self._idle: dict[int, list[mmap.mmap]] = {}
        self._returned: deque[mmap.mmap] = deque()
        # Reentrant, because the garbage collector may give memory back inside a method of this pool.
        self._lock = threading.RLock()
        self._process = os.getpid()

    def allocate(self, count: int) -> Tensor:
        """A uint8 tensor of `count` bytes that begins on a page. Its contents are arbitrary."""
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
        # The array lives as long as any view of the tensor.
        weakref.finalize(array, self._give_back, area).atexit = False
        return torch.from_numpy(array)[:count]

    def size_of(self, count: int) -> int:
        """Bytes that allocate() takes for `count`. They are rounded to a few sizes, so that memory can be used again."""
        return round_up(count, max(PAGE, 1 << max(0, count.bit_length() - 4)))

    @property
    def idle_bytes(self) -> int:
        """Bytes of unused memory that are kept now."""
        with self._lock:
            return sum(map(len, list(self._returned))) + sum(size * len(areas) for size, areas in self._idle.items())

    def settle(self) -> None:
        """Make memory that came back ready to be given out again. Call it while the GPU is idle.

        Page-locked memory has to wait for the GPU. If the process uses several GPUs, nothing is done here, because another one may
        be busy: the next call that needs memory waits instead.
        """
        if self._process != os.getpid():
            return
        if self._returned and not (self.pinned and len(pinning.devices_in_use()) > 1):
            with self._lock:
                self._settle()

    def clear(self) -> None:
        """Give unused memory back to the system, and keep none from now on."""
        with self._lock:
            self._limit = 0
            self._settle()

    def _take(self, size: int) -> mmap.mmap | None:
        with self._lock:
            if not self._idle.get(size) and self._returned:
                self._settle()
            areas = self._idle.get(size)
            return areas.pop() if areas else None

    def _give_back(self, area: mmap.mmap) -> None:
        # The garbage collector may call this anywhere. So page-locked memory is only queued: freeing it has to wait for the GPU,
        # which the next call that needs memory does. The lock is not taken, because its holder may be waiting for the capture of a
        # CUDA graph inside which this runs. In a process that was forked off since, the lock may stay held for ever.
        if self._process != os.getpid():
            return
        self._returned.append(area)
        if not self.pinned or not self._limit:
            with self._lock:
                self._settle()

    def _settle(self) -> None:
        """Make memory that came back ready to be given out, and free what exceeds the limit."""
        returned = [self._returned.popleft() for _ in range(len(self._returned))]
        if self.pinned and returned:
            pinning.wait_for_copies()
        for area in returned:
            # A size that comes back moves to the end, so the sizes at the front are those that nobody uses any more.
            areas = self._idle.pop(len(area), [])
            areas.append(area)
            self._idle[len(area)] = areas
        while self.idle_bytes > self._limit:
            areas = next(areas for areas in self._idle.values() if areas)
            area = areas.pop()
            if self.pinned:
                pinning.unpin(area)
