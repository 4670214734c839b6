"""Copies from page-locked host memory to the device, by addresses.

A prompt of 32 chunks and 32 layers needs a thousand copies of about 2 MiB. Through torch, each takes the host ten microseconds (a view,
checks, a dispatch); the CUDA runtime's own call takes one or two. The copy engine idles for that time. So all copies of a layer are queued
in one call where the runtime has one (CUDA 13), which is 7% faster on an H100.

Where this process has a part of a model's heads, it copies these alone: a stretch of each row, or two, by two-dimensional copies.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np

from cachetune_store import HeadBytes, RowFormat, cudart

LEAST = 512
"""A narrower strip takes as long as one of so many bytes: on an H200, 5.9 to 6.4 ms for 32 layers of 16,384 tokens, whether it had 8 bytes of each row or 512. So two stretches of a row
are one strip, with what lies between them, where that is no wider than they count apart.
"""
MOST = 0.7
"""The largest share of a row that is copied by strips. These are slower for each byte than a copy of whole rows."""
_HOST_TO_DEVICE = 1
_IN_STREAM_ORDER = 1

_Run = Callable[[list[tuple[int, int, int]], int], None]
"""Queues copies (device address, host address, bytes) on a stream."""
_RunStrips = Callable[[list[tuple[int, int, int, int, int]], int], None]
"""Queues copies (device address, host address, pitch, width, rows) on a stream."""


@dataclass(frozen=True)
class Strip:
    """A part of every row: its offset, the bytes from one row's to the next one's, how wide it is, and how many there are for each row."""

    start: int
    pitch: int
    width: int
    each: int = 1

    @property
    def ahead(self) -> int:
        """How many of its bytes are the first ones of the next row; 0: it ends in its own."""
        return max(0, self.start + self.width - self.pitch)


@lru_cache(maxsize=256)
def strips_of(form: RowFormat, wanted: HeadBytes) -> tuple[Strip, ...] | None:
    """The strips by which the wanted bytes of rows are copied, with small gaps; None where rows are copied whole, because that is as fast.

    Rows lie one behind the other, so the last stretch of a row may be one strip with the first ones of the next row. With scales in front of the numbers (`int8`, `fp8`), the
    last heads so have as few strips as the first ones, whose scales lie beside their keys.
    """
    if form.group_bytes:
        return None
    stretches = min(_ways(wanted.row, form.row_bytes), key=_counted)
    if _counted(stretches) > MOST * form.row_bytes:
        return None
    first, width = stretches[0]
    pitch, rest = divmod(form.row_bytes, len(stretches))
    if not rest and all(each == (first + number * pitch, width) for number, each in enumerate(stretches)):
        return (Strip(first, pitch, width, len(stretches)),)
    return tuple(Strip(start, form.row_bytes, length) for start, length in stretches)


_Stretches = Sequence[tuple[int, int]]
"""Offsets and lengths, ascending."""


def _counted(stretches: _Stretches) -> int:
    """The bytes that strips count as."""
    return sum(max(length, LEAST) for _, length in stretches)


def _ways(row: _Stretches, row_bytes: int) -> Iterator[_Stretches]:
    """The ways to have strips: with each of a row's stretches as the first one, and those before it taken from the next row."""
    for first in range(len(row)):
        joined: list[tuple[int, int]] = []
        for start, length in (*row[first:], *((start + row_bytes, length) for start, length in row[:first])):
            both = (joined[-1][0], start + length - joined[-1][0]) if joined else None
            if both is not None and _counted([both]) <= _counted([joined[-1], (start, length)]):
                joined[-1] = both
            else:
                joined.append((start, length))
        if joined[-1][0] < row_bytes:
            yield joined


def copied_bytes(form: RowFormat, wanted: HeadBytes | None, rows: int) -> int:
    """How many bytes `HostCopies.collect_rows` copies."""
    strips = None if wanted is None else strips_of(form, wanted)
    return form.size(rows) if strips is None else rows * sum(strip.width * strip.each for strip in strips)


class HostCopies:
    """Collects copies and queues them together."""

    def __init__(self, run: _Run, run_strips: _RunStrips):
        self._run, self._run_strips = run, run_strips
        self._collected: list[tuple[int, int, int]] = []
        self._strips: list[tuple[int, int, int, int, int]] = []

    def collect(self, device: int, host: int, count: int) -> None:
        """Add a copy of `count` bytes from the address `host` to the address `device`."""
        self._collected.append((device, host, count))

    def collect_rows(self, pieces: Iterable[tuple[int, int, int]], form: RowFormat, wanted: HeadBytes | None) -> None:
        """Add copies of the first rows of pieces: of their wanted bytes where that is faster, else of all (with None always).

        What is copied comes to where it lies in the piece. Strips are taken from page-locked memory alone.

        Args:
            pieces: of each, the device's address, the host's, and how many rows.
            form: how the rows lie.
            wanted: see above.
        """
        strips = None if wanted is None else strips_of(form, wanted)
        if strips is None:
            self._collected += [(device, host, form.size(rows)) for device, host, rows in pieces]
            return
        for device, host, rows in pieces:
            for strip in strips:
                self._collect_strips(device, host, strip, rows)

    def _collect_strips(self, device: int, host: int, strip: Strip, rows: int) -> None:
        count = rows * strip.each
        if strip.ahead and count:
            # What the first row has of it, and the last one, is not beside anything.
            count -= 1
            last = count * strip.pitch + strip.start
            self.collect(device, host, strip.ahead)
            self.collect(device + last, host + last, strip.width - strip.ahead)
        if count:
            self.collect_strip(device + strip.start, host + strip.start, strip.pitch, strip.width, count)

    def collect_strip(self, device: int, host: int, pitch: int, width: int, rows: int) -> None:
        """Add a copy of `width` bytes of each of some rows, which begin `pitch` bytes behind one another, here and there."""
        self._strips.append((device, host, pitch, width, rows))

    def queue(self, stream: int) -> None:
        """Queue the collected copies on a stream."""
        if self._collected:
            self._run(self._collected, stream)
            self._collected = []
        if self._strips:
            self._run_strips(self._strips, stream)
            self._strips = []


def host_copies() -> HostCopies | None:
    """Copies through the CUDA runtime that torch itself uses; None if it can't be found."""
    runs = _runtime()
    return None if runs is None else HostCopies(*runs)


class _Location(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_int), ("id", ctypes.c_int))


class _Attributes(ctypes.Structure):
    """cudaMemcpyAttributes."""

    _fields_ = (
        ("source_access_order", ctypes.c_int),
        ("source", _Location),
        ("destination", _Location),
        ("flags", ctypes.c_uint),
    )


@cache
def _runtime() -> tuple[_Run, _RunStrips] | None:
    library = cudart.runtime()
    if library is None:
        return None
    try:
        # Before CUDA 13, this call has another signature, and needs a newer driver than the runtime requires.
        batched = cudart.major() >= 13
        run = _batched(library.cudaMemcpyBatchAsync) if batched else _one_by_one(library.cudaMemcpyAsync)
        return run, _strip_by_strip(library.cudaMemcpy2DAsync)
    except AttributeError:
        return None


def _batched(call: Any) -> _Run:
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    call.argtypes = [pointer, pointer, pointer, size, pointer, pointer, size, pointer]
    call.restype = ctypes.c_int
    attributes, first = _Attributes(source_access_order=_IN_STREAM_ORDER), size(0)

    def run(copies: list[tuple[int, int, int]], stream: int) -> None:
        # Three arrays, one behind the other; the call has read them when it returns.
        table = np.ascontiguousarray(np.array(copies, dtype=np.int64).T)
        start, step = table.ctypes.data, table.strides[0]
        at = start, start + step, start + 2 * step
        _check(call(*at, len(copies), ctypes.addressof(attributes), ctypes.addressof(first), 1, stream))

    return run


def _one_by_one(call: Any) -> _Run:
    call.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
    call.restype = ctypes.c_int

    def run(copies: list[tuple[int, int, int]], stream: int) -> None:
        for device, host, count in copies:
            _check(call(device, host, count, _HOST_TO_DEVICE, stream))

    return run


def _strip_by_strip(call: Any) -> _RunStrips:
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    call.argtypes = [pointer, size, pointer, size, size, size, ctypes.c_int, pointer]
    call.restype = ctypes.c_int

    def run(strips: list[tuple[int, int, int, int, int]], stream: int) -> None:
        for device, host, pitch, width, rows in strips:
            _check(call(device, pitch, host, pitch, width, rows, _HOST_TO_DEVICE, stream))

    return run


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"copies from page-locked memory to the device failed with CUDA error {status}")
