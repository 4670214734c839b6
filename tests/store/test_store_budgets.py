"""Budgets are kept, the least recently used chunk is evicted first, and chunks in use stay."""

from __future__ import annotations

from pathlib import Path

import pytest
from store_samples import file_of, sample

from cachetune_store import (
    BudgetError,
    ChunkStore,
)

SIZE = 81920
"""Bytes of a sample's file."""
ROWS = 73728
"""Bytes of a sample's rows in host memory (not pinned), as the allocator takes them."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store"


def tier_of(store: ChunkStore, seed: int) -> str | None:
    reader = store.open(sample(seed).key)
    if reader is None:
        return None
    with reader:
        return reader.tier


def test_host_memory_evicts_the_least_recently_used(path: Path) -> None:
    with ChunkStore(path, host_budget=3 * ROWS, pin_memory=False) as store:
        for seed in range(3):
            sample(seed).put(store)
        assert store.stats().host.bytes == 3 * ROWS
        assert tier_of(store, 0) == "host"
        sample(3).put(store)
        assert [tier_of(store, seed) for seed in range(4)] == ["host", "disk", "host", "host"]
        stats = store.stats().host
        assert (stats.chunks, stats.evictions) == (3, 1)
        assert stats.bytes <= stats.budget


def test_host_memory_never_evicts_what_is_in_use(path: Path) -> None:
    with ChunkStore(path, host_budget=2 * ROWS, pin_memory=False) as store:
        sample(0).put(store)
        with store.open(sample(0).key) as reader:
            for seed in range(1, 5):
                sample(seed).put(store)
            assert store.stats().host.pinned == 1
            assert sample(0).matches(reader)
            assert tier_of(store, 0) == "host"
        sample(5).put(store)
        sample(6).put(store)
        assert tier_of(store, 0) == "disk"


def test_host_memory_in_use_up_to_the_budget_leaves_new_chunks_on_disk(path: Path) -> None:
    with ChunkStore(path, host_budget=ROWS, pin_memory=False) as store:
        sample(0).put(store)
        with store.open(sample(0).key):
            sample(1).put(store)
            assert tier_of(store, 1) == "disk"
            assert store.stats().host.bytes <= ROWS


def test_a_chunk_too_big_for_host_memory_stays_on_disk(path: Path) -> None:
    with ChunkStore(path, host_budget=ROWS - 1) as store:
        sample().put(store)
        with store.open(sample().key) as reader:
            assert reader.tier == "disk"
            assert not reader.promote()
            assert reader.bytes_read == 0, "nothing is read for a tier that can't hold it"
            assert sample().matches(reader)
            assert not reader.promote()
        assert store.stats().host.chunks == 0


def test_disk_evicts_the_least_recently_used(path: Path) -> None:
    with ChunkStore(path, host_budget=0, disk_budget=3 * SIZE) as store:
        for seed in range(3):
            sample(seed).put(store)
        store.open(sample(0).key).close()
        sample(3).put(store)
        assert [store.contains(sample(seed).key) for seed in range(4)] == [True, False, True, True]
        assert [key for key, *_ in store.texts()] == []
        stats = store.stats().disk
        assert (stats.chunks, stats.bytes, stats.evictions) == (3, 3 * SIZE, 1)
    with ChunkStore(path, host_budget=0, disk_budget=3 * SIZE) as store:
        sample(4).put(store)
        assert not store.contains(sample(2).key), "the order of use outlives the process"
        assert store.contains(sample(0).key)


def test_a_use_from_host_memory_counts_on_disk_too(path: Path) -> None:
    with ChunkStore(path, disk_budget=2 * SIZE) as store:
        sample(0).put(store)
        sample(1).put(store)
        assert tier_of(store, 0) == "host"
        sample(2).put(store)
        assert file_of(path, sample(0).key).exists()
        assert not file_of(path, sample(1).key).exists()


def test_disk_never_evicts_what_is_in_use(path: Path) -> None:
    with ChunkStore(path, host_budget=0, disk_budget=2 * SIZE) as store:
        sample(0).put(store)
        with store.open(sample(0).key) as reader:
            for seed in range(1, 5):
                sample(seed).put(store)
            assert file_of(path, sample(0).key).exists()
            assert sample(0).matches(reader)
        sample(1).put(store)
        with store.open(sample(1).key), store.open(sample(4).key):
            with pytest.raises(BudgetError, match="close readers"):
                sample(5).put(store)
            assert store.stats().disk.chunks == 2
        sample(5).put(store)


def test_a_chunk_over_the_disk_budget_is_refused_and_nothing_else_goes(path: Path) -> None:
    with ChunkStore(path, disk_budget=SIZE) as store:
        sample(0).put(store)
        with pytest.raises(BudgetError, match="disk_budget"):
            sample(1, tokens=300).put(store)
        assert store.contains(sample(0).key)
        assert not store.contains(sample(1, tokens=300).key)


def test_a_smaller_budget_takes_hold_at_the_next_put(path: Path) -> None:
    with ChunkStore(path) as store:
        for seed in range(5):
            sample(seed).put(store)
    with ChunkStore(path, disk_budget=2 * SIZE) as store:
        sample(5).put(store)
        assert store.stats().disk.bytes <= 2 * SIZE


def test_what_leaves_host_memory_goes_down_if_disk_lost_it(path: Path) -> None:
    with ChunkStore(path, host_budget=2 * ROWS, pin_memory=False, disk_budget=2 * SIZE) as store:
        sample(0).put(store)
        store.set_document("d", [sample(0).key])
        file_of(path, sample(0).key).unlink()
        sample(1).put(store)
        sample(2).put(store)
        assert file_of(path, sample(0).key).exists()
        assert store.stats().disk.demotions == 1
        with store.open(sample(0).key) as reader:
            assert reader.tier == "disk"
            assert sample(0).matches(reader)


def test_what_another_process_deleted_does_not_come_back(path: Path) -> None:
    with ChunkStore(path, host_budget=ROWS, pin_memory=False) as store, ChunkStore(path) as other:
        sample(0).put(store)
        store.set_document("d", [sample(0).key])
        other.delete_document("d")
        sample(1).put(store)
        assert tier_of(store, 1) == "host"
        assert not store.contains(sample(0).key)
        assert not file_of(path, sample(0).key).exists()
        assert store.verify().checked == 1


def test_a_store_in_memory_keeps_its_budget(path: Path) -> None:
    with ChunkStore(None, host_budget=2 * ROWS, pin_memory=False) as store:
        for seed in range(4):
            sample(seed).put(store, text=f"text {seed}")
        assert [store.contains(sample(seed).key) for seed in range(4)] == [False, False, True, True]
        assert sorted(text for _, text, _ in store.texts()) == ["text 2", "text 3"]
        with pytest.raises(BudgetError, match="host_budget"):
            sample(9, tokens=1000).put(store)
        assert store.stats().disk is None
        assert store.stats().as_dict()["disk"] is None
        assert store.verify().ok
