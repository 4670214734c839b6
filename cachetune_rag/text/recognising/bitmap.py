"""An approximate set of hashes (a Bloom filter with one bit a hash), queried for whole arrays at once.

It always says yes to a hash that was added, and may say yes to one that wasn't.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from cachetune_rag.text.recognising.rolling_hash import Hashes

MIX = 0xBF58476D1CE4E5B9
"""An odd number that spreads a hash's bits, from SplitMix64."""
_BITS = 22
_MASK = (1 << 64) - 1


class Bitmap:
    """Four million bits, of which each hash sets one. Only bits are ever added, so reading needs no lock."""

    def __init__(self, hashes: Iterable[int] = ()) -> None:
        self._bytes = np.zeros(1 << (_BITS - 3), dtype=np.uint8)
        at, bits = _places(np.array(list(hashes), dtype=np.uint64))
        np.bitwise_or.at(self._bytes, at, bits)

    def mark(self, value: int) -> None:
        """Put a hash in."""
        # As `_places`, without NumPy, which takes far longer for a single number.
        slot = ((value ^ (value >> 32)) * MIX & _MASK) >> (64 - _BITS)
        self._bytes[slot >> 3] |= 1 << (slot & 7)

    def may_hold(self, hashes: Hashes) -> npt.NDArray[np.bool_]:
        """For each hash: False if it was not added; True if it was, or if another one that shares its bit was."""
        at, bit = _places(hashes)
        found: npt.NDArray[np.bool_] = (self._bytes.take(at) & bit) != 0
        return found

    def count(self) -> int:
        """Bits that are set."""
        return int(np.bitwise_count(self._bytes).sum())


def _places(hashes: Hashes) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint8]]:
    """Byte index and bit mask of each hash, from its high bits after mixing: the low bits of a product are poorly mixed."""
    mixed = (hashes ^ (hashes >> np.uint64(32))) * np.uint64(MIX)
    slots = (mixed >> np.uint64(64 - _BITS)).astype(np.uint32)
    return slots >> np.uint32(3), np.uint8(1) << (slots & np.uint32(7)).astype(np.uint8)
