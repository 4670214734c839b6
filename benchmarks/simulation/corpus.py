"""What is asked: a corpus whose topics are asked for by Zipf's law, and the chunks of each request."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Chunks = NDArray[np.int64]
_REDRAWS = 20


class Corpus:
    """Chunks numbered by how often they are asked for, the most popular first.

    The chunk of rank *i* has a weight of 1 / i ** zipf. Neighbours form topics of `topic` chunks, whose chunks share the topic's weight evenly.

    Args:
        chunks: how many; a multiple of `topic`.
        zipf: 0: all are asked for equally often.
        topic: chunks of a topic.
    """

    def __init__(self, chunks: int, zipf: float, topic: int) -> None:
        if not 1 <= topic <= chunks or chunks % topic:
            raise ValueError(f"{chunks} chunks can't be divided into topics of {topic}: use a multiple of it.")
        if not 0 <= zipf < 10:
            raise ValueError(f"zipf is {zipf}: use a number from 0 (all alike) to 10.")
        self.chunks, self.topic = chunks, topic
        weights = (np.arange(1, chunks + 1, dtype=np.float64) ** -zipf).reshape(-1, topic).sum(axis=1)
        self.shares: NDArray[np.float64] = weights / weights.sum()
        """How much of all that is asked for falls to each topic."""
        self._below = np.cumsum(self.shares)

    def draw(self, rng: np.random.Generator, requests: int, shown: int, together: float) -> tuple[Chunks, Chunks]:
        """Requests: the topic of each, [requests], and its chunks, [requests, shown], no two of a request alike.

        Args:
            rng: gives the random numbers.
            requests: how many.
            shown: chunks that a request shows.
            together: share of a request's chunks that are of its topic. The others are drawn one by one from the whole corpus.
        """
        if not 1 <= shown <= self.chunks:
            raise ValueError(f"{shown} chunks a request: use 1 to the corpus' {self.chunks}.")
        if not 0 <= together <= 1:
            raise ValueError(f"together is {together}: use a share from 0 to 1.")
        of_topic = min(round(together * shown), self.topic)
        topics = self._topics(rng, requests)
        drawn = np.empty((requests, shown), np.int64)
        if of_topic:
            order = rng.random((requests, self.topic), dtype=np.float32).argpartition(of_topic - 1, axis=1)
            drawn[:, :of_topic] = topics[:, None] * self.topic + order[:, :of_topic]
        drawn[:, of_topic:] = self._single(rng, (requests, shown - of_topic))
        self._redraw_repeats(rng, drawn, of_topic)
        return topics, drawn

    def _topics(self, rng: np.random.Generator, count: int) -> Chunks:
        found = np.searchsorted(self._below, rng.random(count), side="right")
        return np.minimum(found, len(self.shares) - 1).astype(np.int64)

    def _single(self, rng: np.random.Generator, shape: tuple[int, int]) -> Chunks:
        count = shape[0] * shape[1]
        return (self._topics(rng, count) * self.topic + rng.integers(0, self.topic, count)).reshape(shape)

    def _redraw_repeats(self, rng: np.random.Generator, drawn: Chunks, kept: int) -> None:
        """Put others in the place of chunks that their request has already, from column `kept` on."""
        for _ in range(_REDRAWS):
            repeated = _repeated(drawn, kept)
            count = int(repeated.sum())
            if not count:
                return
            drawn[repeated] = self._single(rng, (count, 1))[:, 0]
        # A request shows nearly all of what is ever asked for: take the most popular ones that it lacks.
        for row in np.flatnonzero(_repeated(drawn, kept).any(axis=1)):
            has = list(dict.fromkeys(drawn[row].tolist()))
            known = set(has)
            spare = (chunk for chunk in range(self.chunks) if chunk not in known)
            drawn[row] = has + [next(spare) for _ in range(drawn.shape[1] - len(has))]


def _repeated(drawn: Chunks, kept: int) -> NDArray[np.bool_]:
    order = np.argsort(drawn, axis=1, kind="stable")
    ordered = np.take_along_axis(drawn, order, axis=1)
    repeats = np.zeros(drawn.shape, bool)
    np.put_along_axis(repeats, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
    repeats[:, :kept] = False  # these are of one topic, each once; a stable order puts them before what repeats them
    return repeats
