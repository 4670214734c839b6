"""What a store holds, counted for those who use it and for its operator."""

from __future__ import annotations

from collections.abc import Iterable

from .documents import Documents
from .keys import ChunkKey
from .placement import Placement
from .pruning import by_tenant, groups
from .repair import Repair
from .stats import ChunkGroup, DocumentInfo, StoreStats, TenantStats

__all__ = ["Overview"]


class Overview:
    """Counts documents and chunks. Nothing is changed, unless the index turns out to be damaged.

    Args:
        placement, documents: the store's chunks and documents.
        repair: mends the index, should it turn out to be damaged.
    """

    def __init__(self, placement: Placement, documents: Documents, repair: Repair) -> None:
        self._placement, self._documents, self._repair = placement, documents, repair

    def documents(self, tenant: str) -> list[DocumentInfo]:
        """A tenant's documents, by id."""
        found = []
        for doc_id, keys in self._repair.healed(lambda: list(self._documents.of(tenant))):
            sizes = [size for size in map(self._placement.size_of, dict.fromkeys(keys)) if size]
            found.append(DocumentInfo(doc_id, tenant, keys, len(sizes), sum(sizes)))
        return sorted(found, key=lambda info: info.id)

    def sample(self, tenant: str, most: int) -> list[tuple[ChunkKey, ...]]:
        """The chunks of some of a tenant's documents, at most so many, which lie evenly among all. Only the index is read."""
        return self._repair.healed(lambda: _evenly(self._documents.of(tenant), most))

    def groups(self) -> list[ChunkGroup]:
        """Groups of chunks that were made alike, the largest first. The head of every file is read."""
        return groups(self._placement)

    def tenants(self, found: Iterable[ChunkGroup] | None) -> list[TenantStats]:
        """What each tenant has, the largest first.

        Args:
            found: what `groups` returned just now; None: it is called.
        """
        return by_tenant(self.groups() if found is None else found, self._repair.healed(self._documents.by_tenant))

    def stats(self) -> StoreStats:
        """What the store holds, and what it did in this process, for all tenants together."""
        placement = self._placement
        tiers = {tier.name: self._repair.healed(tier.stats) for tier in placement.tiers}
        return StoreStats(
            hits=placement.hits,
            misses=placement.misses,
            damaged=placement.damaged + sum(tier.damaged for tier in tiers.values()),
            documents=self._repair.healed(self._documents.count),
            host=tiers["host"],
            disk=tiers.get("disk"),
            lifetime=self._repair.healed(placement.lifetime),
            device=tiers.get("device"),
            remote=tiers.get("remote"),
        )


def _evenly(documents: Iterable[tuple[str, tuple[ChunkKey, ...]]], most: int) -> list[tuple[ChunkKey, ...]]:
    """The chunks of every so many of these documents, at most of `most`. There may be millions of them, so the others are not kept."""
    kept: list[tuple[ChunkKey, ...]] = []
    step = 1
    for number, (_, keys) in enumerate(documents):
        if number % step == 0:
            kept.append(keys)
        if len(kept) > most:
            kept, step = kept[::2], 2 * step
    return kept
