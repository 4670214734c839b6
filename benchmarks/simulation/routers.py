"""Who answers a request: the replica whose turn it is, or the one that the router of `cachetune_ray` takes."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping

import numpy as np

from cachetune_ray.routing import SETTLE_SECONDS, SPREAD, ChunkRouting
from cachetune_ray.sketch import Samples

_NOTHING = np.empty(0, np.uint64)


class InTurns:
    """Round-robin."""

    def __init__(self, replicas: int) -> None:
        self._replicas, self._next = replicas, 0

    def choose(self, now: float, chunks: list[int], loads: Mapping[str, int]) -> int:
        """The replica for a request."""
        self._next = (self._next + 1) % self._replicas
        return self._next

    def used(self, replica: int, chunk: int, evicted: int | None) -> None:
        """A replica has a chunk in memory, and another one no more."""


class ByChunks(ChunkRouting):
    """The router of `cachetune_ray`: its order of replicas is the real one.

    Only what it knows of each replica's memory is kept differently, so that a thousand requests don't take as long as in a cluster: a chunk is one hash,
    and a sketch has no false hits. What it knows has the same age: what a replica had when it last published, and what it was sent since the time before.

    Args:
        replicas: how many.
        every: seconds from one sketch of a replica to the next.
    """

    def __init__(self, replicas: int, every: float) -> None:
        self._time = 0.0
        super().__init__(spread=SPREAD, settle=SETTLE_SECONDS, clock=lambda: self._time)
        self.names = [f"{number:04}" for number in range(replicas)]
        self.keep(self.names)
        self._every, self._due, self._before = every, 0.0, float("-inf")
        self._published: dict[int, int] = {}  # by chunk: which replicas have it, a bit each
        self._changed: list[dict[int, bool]] = [{} for _ in self.names]
        self._lately: list[Counter[int]] = [Counter() for _ in self.names]
        self._sent: deque[tuple[float, int, list[int]]] = deque()
        self._sent_to: dict[int, int] = {}
        self._has: list[int] = []

    def choose(self, now: float, chunks: list[int], loads: Mapping[str, int]) -> int:
        """The replica for a request, which is sent there."""
        self._time = now
        if now >= self._due:
            self._publish(now)
        self._forget(now - SETTLE_SECONDS)
        # For each chunk the replicas that have it, a bit each: sketches, and what was sent.
        self._has = [self._published.get(chunk, 0) | self._sent_to.get(chunk, 0) for chunk in chunks]
        replica = int(self.rank(_NOTHING, loads)[0])
        self.sent(self.names[replica], _NOTHING)
        self._sent.append((now, replica, chunks))
        lately, bit = self._lately[replica], 1 << replica
        for chunk in chunks:
            lately[chunk] += 1
            self._sent_to[chunk] = self._sent_to.get(chunk, 0) | bit
        return replica

    def found(self, replica: str, samples: Samples) -> int:
        """See the base class: of the request that is asked for."""
        bit = 1 << int(replica)
        return sum(1 for has in self._has if has & bit)

    def used(self, replica: int, chunk: int, evicted: int | None) -> None:
        """A replica has a chunk in memory, and another one no more: its next sketch tells."""
        changed = self._changed[replica]
        changed[chunk] = True
        if evicted is not None:
            changed[evicted] = False

    def _publish(self, now: float) -> None:
        self._forget(self._before)
        for replica, changed in enumerate(self._changed):
            bit = 1 << replica
            for chunk, held in changed.items():
                had = self._published.get(chunk, 0)
                has = had | bit if held else had & ~bit
                if has:
                    self._published[chunk] = has
                elif had:
                    del self._published[chunk]
            changed.clear()
        self._before, self._due = now, now + self._every

    def _forget(self, before: float) -> None:
        while self._sent and self._sent[0][0] < before:
            _, replica, chunks = self._sent.popleft()
            lately = self._lately[replica]
            for chunk in chunks:
                lately[chunk] -= 1
                if not lately[chunk]:
                    del lately[chunk]
                    left = self._sent_to[chunk] & ~(1 << replica)
                    if left:
                        self._sent_to[chunk] = left
                    else:
                        del self._sent_to[chunk]
