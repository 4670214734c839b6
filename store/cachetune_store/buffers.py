"""Host memory for rows: page-aligned, so that files can be read into it without a copy."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

__all__ = ["PAGE", "allocate", "allocated_bytes", "memory_of", "round_up"]

PAGE = 4096
"""Alignment, in bytes, of everything that is read from or written to a chunk file as a unit."""
_HUGE = 2 << 20


def round_up(count: int, unit: int = PAGE) -> int:
    """The smallest multiple of `unit` that is not below `count`."""
    return -(-count // unit) * unit


def allocate(count: int, *, pinned: bool) -> Tensor:
    """A uint8 tensor of `count` bytes that begins on a page; contents are arbitrary."""
    if pinned:
        raw = torch.empty(count, dtype=torch.uint8, pin_memory=True)
        if raw.data_ptr() % PAGE == 0:
            return raw
        raw = torch.empty(count + PAGE, dtype=torch.uint8, pin_memory=True)
        start = -raw.data_ptr() % PAGE
        return raw[start : start + count]
    area = mmap.mmap(-1, count)
    if count >= _HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
        # Far fewer page faults while the first read fills the memory.
        area.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(area, dtype=torch.uint8)


def allocated_bytes(count: int, *, pinned: bool) -> int:
    """Bytes that allocate() really takes: torch rounds pinned memory up to a power of two."""
    return 1 << (count - 1).bit_length() if pinned else count


def memory_of(tensor: Tensor) -> memoryview:
    """The writable bytes of a contiguous uint8 CPU tensor, without a copy."""
    return memoryview(tensor.numpy().data)
