"""A compact sketch of the texts of chunks, by which a router that has no tokenizer and no index sees how much of a prompt is among them.

Of all windows of a text that are `WINDOW` characters long, those are taken whose hash is divisible by `RATE`: about one in so many, and the same ones wherever
the text stands. A sketch is a Bloom filter of these hashes. The share of a prompt's hashes that are in it is about the share of the prompt's text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

WINDOW = 24
RATE = 32
_BITS_EACH = (
    16  # bits of the filter for each hash: with four places each, two of a thousand are taken for known wrongly
)
_PLACES = 4
_LEAST_BITS = 1 << 10
_BASE = np.uint64(0x9E3779B97F4A7C15)

Samples = NDArray[np.uint64]


def samples_of(texts: Iterable[str]) -> Samples:
    """The hashes by which these texts are known, each once. Texts shorter than a window have none."""
    found = [_sampled(text) for text in texts]
    return np.unique(np.concatenate(found)) if found else np.empty(0, np.uint64)


def _sampled(text: str) -> Samples:
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4").astype(np.uint64)
    count = len(codes) - WINDOW + 1
    if count <= 0:
        return np.empty(0, np.uint64)
    with np.errstate(over="ignore"):
        hashes = np.zeros(count, np.uint64)
        for at in range(WINDOW):
            hashes = hashes * _BASE + codes[at : at + count] + np.uint64(1)
        mixed = _mixed(hashes)
        taken: Samples = mixed[mixed % np.uint64(RATE) == 0]
    return taken


def _mixed(values: Samples) -> Samples:
    """Spreads the bits of values (the end of MurmurHash3)."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
        values = (values ^ (values >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
        return values ^ (values >> np.uint64(33))


class Sketch:
    """Which hashes were seen; rarely, one is taken for seen that wasn't.

    Args:
        bits: the filter, a power of two of bits.
    """

    def __init__(self, bits: NDArray[np.uint8]):
        self._bits = bits

    @classmethod
    def of(cls, samples: Samples) -> Sketch:
        """A sketch of these hashes, as large as they need."""
        wanted = max(_LEAST_BITS, len(samples) * _BITS_EACH)
        bits = np.zeros(1 << (wanted - 1).bit_length(), np.uint8)
        made = cls(bits)
        for places in made._places(samples):
            bits[places] = 1
        return made

    @classmethod
    def from_bytes(cls, data: bytes) -> Sketch:
        """A sketch that `to_bytes` gave."""
        return cls(np.unpackbits(np.frombuffer(data, np.uint8)))

    def to_bytes(self) -> bytes:
        """The sketch in an eighth of its size."""
        return np.packbits(self._bits).tobytes()

    def known(self, samples: Samples) -> NDArray[np.bool_]:
        """Which of the hashes are in it."""
        found = np.ones(len(samples), bool)
        for places in self._places(samples):
            found &= self._bits[places] == 1
        return found

    def _places(self, samples: Samples) -> Sequence[NDArray[np.int64]]:
        last = np.uint64(len(self._bits) - 1)
        with np.errstate(over="ignore"):
            second = _mixed(samples + _BASE) | np.uint64(1)
            first = samples // np.uint64(RATE)
            return [((first + np.uint64(i) * second) & last).astype(np.int64) for i in range(_PLACES)]
