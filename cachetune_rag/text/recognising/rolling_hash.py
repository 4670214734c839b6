"""Polynomial hashes of all slices of a sequence, vectorised."""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt

_BASE = 0x9E3779B97F4A7C15
_INVERSE = pow(_BASE, -1, 1 << 64)
_MASK = (1 << 64) - 1
_GROWTH = 1 << 17

Hashes = npt.NDArray[np.uint64]


class PrefixHashes:
    """Polynomial prefix hashes, modulo 2**64, of a sequence given as a number for each element: `sums[n]` is that of the first n."""

    def __init__(self, codes: Hashes) -> None:
        self._inverses = _powers(_INVERSE, len(codes) + 1)
        self.sums = np.zeros(len(codes) + 1, dtype=np.uint64)
        np.cumsum(codes * _powers(_BASE, len(codes)), out=self.sums[1:])

    def slices(self, length: int, first: int, last: int) -> Hashes:
        """Hash of every slice of `length` elements that begins at `first` or behind it and before `last`."""
        last = min(last, len(self.sums) - length)
        sums = self.sums
        hashes: Hashes = (sums[first + length : last + length] - sums[first:last]) * self._inverses[first:last]
        return hashes

    def slices_at(self, starts: npt.NDArray[np.intp], length: int) -> Hashes:
        """Hash of the slice of `length` elements at each of `starts`; cut short at the end of the sequence."""
        ends = np.minimum(starts + length, len(self.sums) - 1)
        hashes: Hashes = (self.sums[ends] - self.sums[starts]) * self._inverses[starts]
        return hashes

    def between(self, starts: npt.NDArray[np.intp], ends: npt.NDArray[np.intp]) -> Hashes:
        """Hash of each slice `[start, end)`."""
        hashes: Hashes = (self.sums[ends] - self.sums[starts]) * self._inverses[starts]
        return hashes

    def slices_from(self, start: int, lengths: list[int]) -> list[int]:
        """Hash of the slice at `start` of each of `lengths`, which are few."""
        # Without NumPy's arithmetic, which takes far longer for a few numbers.
        before, inverse, sums = int(self.sums[start]), int(self._inverses[start]), self.sums
        return [(int(sums[start + length]) - before) * inverse & _MASK for length in lengths]


class _PowerTable:
    """Powers of the two bases, grown as longer sequences come along and shared by all."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tables: dict[int, Hashes] = {}

    def __call__(self, base: int, count: int) -> Hashes:
        table = self._tables.get(base)
        if table is None or len(table) < count:
            with self._lock:
                steps = np.full(-(-count // _GROWTH) * _GROWTH, base, dtype=np.uint64)
                steps[0] = 1
                table = self._tables[base] = np.cumprod(steps)
        return table[:count]


_powers = _PowerTable()
