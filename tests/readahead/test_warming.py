"""Memory that is filled before anybody asks."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "store"))

from store_samples import sample

from cachetune_rag.readahead.prefetcher import Prefetcher
from cachetune_rag.readahead.warming import Warming
from cachetune_store import ChunkKey, ChunkStore

COUNT = 24


@pytest.fixture
def stored(tmp_path: Path) -> list[ChunkKey]:
    """Keys of chunks that a folder has, all of one size."""
    with ChunkStore(tmp_path / "kv", host_budget=0) as store:
        for seed in range(COUNT):
            sample(seed).put(store)
    return [sample(seed).key for seed in range(COUNT)]


def warmed(store: ChunkStore, keys: list[ChunkKey]) -> Warming:
    prefetcher = Prefetcher(store)
    warming = Warming(store, prefetcher, keys)
    warming.start()
    assert warming.wait(30)
    prefetcher.close()
    return warming


def test_chunks_are_in_memory_the_most_wanted_first(tmp_path: Path, stored: list[ChunkKey]) -> None:
    gone = sample(1000).key
    with ChunkStore(tmp_path / "kv") as store:
        warming = warmed(store, [gone, *stored])
        assert store.keys_in_memory() == stored, "the most wanted is evicted last"
        assert (warming.chunks, warming.bytes) == (COUNT, store.stats().host.bytes)


def test_nothing_makes_room_for_them(tmp_path: Path, stored: list[ChunkKey]) -> None:
    with ChunkStore(tmp_path / "kv", host_budget=0) as store:
        size = store.size_of(stored[0])
    with ChunkStore(tmp_path / "kv", host_budget=11 * size) as store:
        used = stored[-1]
        with store.open(used) as reader:
            for layer in range(len(reader.layout.layers)):
                reader.read(layer, reader.layout.tokens)
            assert reader.promote()
        warmed(store, stored)
        found = store.keys_in_memory()
        assert used in found
        assert store.stats().host.evictions == 0
        assert len(found) > 8, "as many as there is room for"
        assert found[0] == stored[0]


def test_it_ends_where_the_store_is_closed(tmp_path: Path, stored: list[ChunkKey]) -> None:
    store = ChunkStore(tmp_path / "kv")
    prefetcher = Prefetcher(store)
    prefetcher.close()
    store.close()
    warming = Warming(store, prefetcher, stored)
    warming.start()
    assert warming.wait(30)
    assert warming.chunks == 0
