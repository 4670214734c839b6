"""A tier that nothing else knows takes part as its kind says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
from store_samples import Sample, sample

from cachetune_store.buffers import SlabPool
from cachetune_store.chunk import Chunk, ChunkHead, encode_chunk
from cachetune_store.claims import MemoryClaims
from cachetune_store.errors import StoreError
from cachetune_store.index import MemoryIndex
from cachetune_store.keys import ChunkKey
from cachetune_store.placement import Placement
from cachetune_store.readers import ChunkReader, HostReader
from cachetune_store.stats import Counters, TierStats
from cachetune_store.tier_kinds import TierKind
from cachetune_store.tiers import HostTier, LastingTier, Pins


class ShelfReader(HostReader):
    kind = TierKind("shelf", in_memory=False, lasting=True, shared_by="machines")

    def promote(self) -> bool:
        return self.on_promote is not None and self.on_promote(self.read_all())


class Shelf(LastingTier):
    """Keeps chunks in a dict, and says of itself that they last."""

    kind = ShelfReader.kind

    def __init__(self, name: str) -> None:
        self.kind = TierKind(name, in_memory=False, lasting=True, shared_by="machines")
        self.budget, self.counters = 1 << 30, Counters()
        self.chunks: dict[ChunkKey, Chunk] = {}
        self.damaged: set[ChunkKey] = set()

    def contains(self, key: ChunkKey) -> bool:
        return key in self.chunks

    def size_of(self, key: ChunkKey) -> int:
        return self.chunks[key].host_bytes if key in self.chunks else 0

    def open(self, key: ChunkKey, errors: list[StoreError] | None = None) -> ChunkReader | None:
        if key not in self.chunks:
            return None
        reader = ShelfReader(self.chunks[key])
        reader.tier = self.name
        return reader

    def holds(self, key: ChunkKey, *, with_text: bool) -> bool:
        return key in self.chunks and not (with_text and self.chunks[key].head.text is None)

    def heads(self) -> Iterator[tuple[ChunkKey, ChunkHead | Exception]]:
        return iter([(key, chunk.head) for key, chunk in self.chunks.items()])

    def touch(self, key: ChunkKey) -> None:
        pass

    def admit(self, chunk: Chunk) -> list[Chunk]:
        self.chunks[chunk.key] = chunk
        return []

    def remove(self, key: ChunkKey) -> int:
        size = self.size_of(key)
        self.chunks.pop(key, None)
        return size

    def set_aside(self, key: ChunkKey) -> bool:
        return key in self.damaged and self.remove(key) > 0

    def flush(self) -> None:
        pass

    def stats(self) -> TierStats:
        return TierStats(self.name, len(self.chunks), 0, self.budget, 0, **asdict(self.counters))

    def close(self) -> None:
        pass


def encoded(one: Sample) -> Chunk:
    return encode_chunk(
        one.key, one.layers, one.scores, namespace=one.namespace, token_ids=one.token_ids, text=None, codec="exact",
        pool=SlabPool(pinned=False, limit=0),
    )  # fmt: skip


@pytest.fixture
def tiers() -> tuple[HostTier, Shelf, Shelf]:
    return HostTier(1 << 30, Pins()), Shelf("near"), Shelf("far")


@pytest.fixture
def placement(tiers: tuple[HostTier, Shelf, Shelf]) -> Placement:
    return Placement(tiers, MemoryIndex(), MemoryClaims())


def tier_of(placement: Placement, key: ChunkKey) -> str | None:
    reader = placement.open(key, [])
    if reader is None:
        return None
    with reader:
        return reader.tier


def test_a_new_chunk_goes_to_every_tier_that_lasts_and_to_memory(
    placement: Placement, tiers: tuple[HostTier, Shelf, Shelf]
) -> None:
    one = sample()
    assert placement.put(encoded(one)) == tiers[1].size_of(one.key)
    assert [tier.contains(one.key) for tier in tiers] == [True, True, True]


def test_the_fastest_tier_that_has_a_chunk_gives_it(placement: Placement, tiers: tuple[HostTier, Shelf, Shelf]) -> None:
    one = sample()
    placement.put(encoded(one))
    for tier in tiers:
        assert tier_of(placement, one.key) == tier.name
        tier.remove(one.key)
    assert tier_of(placement, one.key) is None


def test_a_chunk_comes_up_from_any_tier(placement: Placement, tiers: tuple[HostTier, Shelf, Shelf]) -> None:
    one = sample()
    tiers[2].admit(encoded(one))
    with placement.open(one.key, []) as reader:
        assert reader.tier == "far"
        assert reader.promote()
    assert tier_of(placement, one.key) == "host"
    assert tiers[0].counters.promotions == 1


def test_a_chunk_that_was_deleted_while_it_was_read_does_not_come_back(
    placement: Placement, tiers: tuple[HostTier, Shelf, Shelf]
) -> None:
    one = sample()
    tiers[2].admit(encoded(one))
    with placement.open(one.key, []) as reader:
        placement.remove(one.key)
        assert not reader.promote()
    assert tier_of(placement, one.key) is None


def test_a_damaged_chunk_leaves_only_the_tier_where_it_is_damaged(
    placement: Placement, tiers: tuple[HostTier, Shelf, Shelf]
) -> None:
    one = sample()
    placement.put(encoded(one))
    tiers[1].damaged.add(one.key)
    assert placement.discard(one.key)
    assert tier_of(placement, one.key) == "far"


def test_what_no_tier_that_lasts_has_goes_home_when_it_leaves_memory(tmp_path: Path) -> None:
    first, second = encoded(sample(1)), encoded(sample(2))
    host, near, far = HostTier(first.host_bytes, Pins()), Shelf("near"), Shelf("far")
    index = MemoryIndex()
    placement = Placement((host, near, far), index, MemoryClaims())
    index.set(f"ref/{first.key}", 1)
    host.admit(first)
    placement.put(second)
    assert near.contains(first.key)
    assert not far.contains(first.key)
    assert near.counters.demotions == 1
