"""Ray Serve's side of the routing: which replica of a deployment a request is handed to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from cachetune_ray.question import Question
from cachetune_ray.routing import SETTLE_SECONDS, SPREAD, ChunkRouting
from cachetune_ray.sketch import Samples

STATS = "cachetune_sketch"
"""Under this name, a replica's routing statistics have its sketch and the version of it."""


class ChunkRouter(RequestRouter):  # type: ignore[misc]  # Ray has no types for it
    """Sends a request where most of its chunks are in host memory, within a bound on load (`ChunkRouting`)."""

    def initialize_state(self, spread: float = SPREAD, settle: float = SETTLE_SECONDS) -> None:
        """Ray calls this with `request_router_kwargs`."""
        self._routing = ChunkRouting(spread=spread, settle=settle)
        self._answering: Counter[ReplicaID] = Counter()

    def update_replicas(self, replicas: Sequence[RunningReplica]) -> None:
        """See the base class. Called when replicas come or go, and when they have published something."""
        super().update_replicas(replicas)
        self._routing.keep([replica.replica_id.to_full_id_str() for replica in replicas])
        for gone in self._answering.keys() - {replica.replica_id for replica in replicas}:
            del self._answering[gone]

    async def choose_replicas(
        self, candidate_replicas: Sequence[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """See the base class."""
        by_name = {replica.replica_id.to_full_id_str(): replica for replica in candidate_replicas}
        for name, replica in by_name.items():
            if STATS in replica.routing_stats:
                self._routing.published(name, *replica.routing_stats[STATS])
        loads = {name: self._load(replica.replica_id) for name, replica in by_name.items()}
        return [[by_name[name]] for name in self._routing.rank(_samples(pending_request), loads)]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """See the base class."""
        self._answering[replica_id] += 1
        self._routing.sent(replica_id.to_full_id_str(), _samples(pending_request))

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """See the base class."""
        if self._answering[replica_id] > 0:
            self._answering[replica_id] -= 1

    def _load(self, replica: ReplicaID) -> int:
        """Requests that a replica has: those that were sent from here, or more where it said so of itself."""
        return max(self._answering[replica], self.replica_queue_len_cache.get(replica) or 0)


def _samples(pending: PendingRequest | None) -> Samples:
    question = next((each for each in pending.args if isinstance(each, Question)), None) if pending else None
    return np.empty(0, np.uint64) if question is None else question.samples
