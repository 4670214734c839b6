"""What a replica's host memory and folder hold: simulated one use after the other, or approximated after Che."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np

from simulation.corpus import Chunks, Corpus


class Lru:
    """The chunks that were used last, as many as there is room for.

    Args:
        room: how many.
        held: what it has at first, the one that was used last at the front.
    """

    def __init__(self, room: int, held: Sequence[int] | Chunks = ()) -> None:
        self.room = room
        self._held: OrderedDict[int, None] = OrderedDict.fromkeys(np.asarray(held[:room], np.int64)[::-1].tolist())

    def __contains__(self, chunk: int) -> bool:
        return chunk in self._held

    def __iter__(self) -> Iterator[int]:
        return iter(self._held)

    def use(self, chunk: int) -> int | None:
        """A chunk was used, and is kept from now on. Returns the one that made room for it."""
        if chunk in self._held:
            self._held.move_to_end(chunk)
            return None
        if not self.room:
            return chunk
        self._held[chunk] = None
        return self._held.popitem(last=False)[0] if len(self._held) > self.room else None


def latest(used: Chunks, room: int, corpus: Corpus) -> Chunks:
    """The `room` chunks that were used last, latest first.

    Args:
        used: chunks in the order of their use, the latest first, with repeats.
        room: how many are wanted. What `used` lacks is filled up with the most popular of the others.
        corpus: all chunks.
    """
    chunks, first = np.unique(used, return_index=True)
    held = chunks[np.argsort(first)][:room]
    short = min(room, corpus.chunks) - len(held)
    if short > 0:
        others = np.setdiff1d(np.arange(min(corpus.chunks, room + len(held))), held, assume_unique=True)
        held = np.concatenate([held, others[:short]])
    return held


def hit_rate(corpus: Corpus, room: int) -> float:
    """The share of uses that find their chunk in an LRU cache, after Che, Tung and Wang (2002).

    A chunk is found if it was used within the time in which `room` different chunks are used, and that time is taken to be the same for all. It
    holds for uses that are independent of each other, so for a replica that gets its share of all requests, whatever they ask.
    """
    if room >= corpus.chunks:
        return 1.0
    rates = corpus.shares / corpus.topic
    low, high = 0.0, 1.0
    while _different(rates, high) * corpus.topic < room:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _different(rates, middle) * corpus.topic < room else (low, middle)
    return float((corpus.shares * -np.expm1(-rates * low)).sum())


def _different(rates: np.ndarray, uses: float) -> float:
    return float(-np.expm1(-rates * uses).sum())
