"""The device tier: which chunks are copied to it and evicted from it, and that rows stay while they are read.

On a machine without a GPU its memory is the host's, which is enough to see all but the order of streams.
"""

from __future__ import annotations

import gc
import random
import threading
from pathlib import Path

import pytest
import torch
from store_samples import file_of, flip, sample

from cachetune_store import BudgetError, ChunkStore, StoreClosedError

ROWS = 73728
"""Bytes of a sample's rows."""


def tier_of(store: ChunkStore, seed: int, *, promote: bool = False) -> str | None:
    reader = store.open(sample(seed).key)
    if reader is None:
        return None
    with reader:
        assert sample(seed).matches(reader)
        if promote:
            reader.promote()
        return reader.tier


def opened(path: Path | None, budget: int = 3 * ROWS, **options: object) -> ChunkStore:
    return ChunkStore(path, device="cpu", device_budget=budget, **options)


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("codec", ["exact", "fp8", "int4", "int8"])
def test_a_chunk_that_was_used_comes_up_bit_for_bit(tmp_path: Path, codec: str, in_memory: bool) -> None:
    with opened(None if in_memory else tmp_path, codec=codec) as store:
        sample().put(store)
        assert store.stats().device.chunks == 0, "what is new is not in use yet"
        assert tier_of(store, 0, promote=True) == "host"
        with store.open(sample().key) as reader:
            assert reader.tier == "device"
            assert reader.in_memory
            assert sample().matches(reader)
            assert reader.promote()
            assert reader.locate(1, 70) == reader.read(1, 150).data_ptr() == reader.addresses[1]
        stats = store.stats()
        device = stats.device
        assert (device.chunks, device.hits, device.misses, device.promotions, device.pinned) == (1, 1, 2 - 1, 1, 0)
        assert device.bytes_read == reader.bytes_read > 0
        assert 0 < device.bytes <= device.budget
        assert stats.hits == 2
        assert stats.as_dict()["device"]["name"] == "device"
        assert set(stats.lifetime) >= {"device", "host"}


def test_chunks_come_up_one_tier_at_each_use(tmp_path: Path) -> None:
    with ChunkStore(tmp_path) as store:
        sample().put(store)
        assert store.stats().device is None
        assert store.stats().as_dict()["device"] is None
    with opened(tmp_path) as store:
        assert [tier_of(store, 0, promote=True) for _ in range(4)] == ["disk", "host", "device", "device"]


@pytest.mark.parametrize("host_budget", [0, ROWS - 1])
def test_without_room_in_host_memory_a_chunk_comes_straight_from_disk(tmp_path: Path, host_budget: int) -> None:
    with opened(tmp_path, host_budget=host_budget) as store:
        sample().put(store)
        with store.open(sample().key) as reader:
            assert reader.promote()
        assert tier_of(store, 0) == "device"
        assert store.stats().device.promotions == 1


def test_the_least_recently_used_leaves(tmp_path: Path) -> None:
    with opened(tmp_path, 2 * ROWS) as store:
        for seed in range(3):
            sample(seed).put(store)
            assert tier_of(store, seed, promote=True) == "host"
            if seed == 1:
                assert tier_of(store, 0) == "device"
        assert [tier_of(store, seed) for seed in range(3)] == ["device", "host", "device"]
        stats = store.stats().device
        assert (stats.chunks, stats.bytes, stats.evictions) == (2, 2 * ROWS, 1)


def test_a_chunk_in_use_stays(tmp_path: Path) -> None:
    with opened(tmp_path, ROWS) as store:
        for seed in range(2):
            sample(seed).put(store)
        tier_of(store, 0, promote=True)
        with store.open(sample(0).key) as reader:
            assert tier_of(store, 1, promote=True) == "host"
            assert tier_of(store, 1) == "host"
            assert store.stats().device.pinned == 1
            assert sample(0).matches(reader)
        tier_of(store, 1, promote=True)
        assert [tier_of(store, seed) for seed in range(2)] == ["host", "device"]


def test_a_prompt_over_the_budget_does_not_push_its_own_chunks_out(tmp_path: Path) -> None:
    with opened(tmp_path, 2 * ROWS) as store:
        for seed in range(3):
            sample(seed).put(store)
        for _ in range(3):
            readers = [store.open(sample(seed).key) for seed in range(3)]
            [reader.promote() for reader in readers]
            tiers = [reader.tier for reader in readers]
            [reader.close() for reader in readers]
        assert tiers == ["device", "device", "host"]
        assert store.stats().device.evictions == 0


def test_a_chunk_larger_than_the_budget_stays_below(tmp_path: Path) -> None:
    with opened(tmp_path, ROWS - 1) as store:
        sample().put(store)
        assert [tier_of(store, 0, promote=True) for _ in range(2)] == ["host", "host"]
        assert store.stats().device.bytes == 0


def test_a_deleted_chunk_is_gone_but_for_who_reads_it(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        one = sample()
        one.put(store)
        store.set_document("d", [one.key])
        tier_of(store, 0, promote=True)
        with store.open(one.key) as reader:
            assert reader.tier == "device"
            store.delete_document("d")
            assert not store.contains(one.key)
            assert store.open(one.key) is None
            assert store.stats().device.bytes == 0
            assert one.matches(reader)
        with pytest.raises(StoreClosedError):
            reader.read(0, 1)
        with pytest.raises(StoreClosedError):
            reader.locate(0, 1)


def test_a_chunk_set_aside_leaves_the_device(tmp_path: Path) -> None:
    for path in (tmp_path, None):
        with opened(path) as store:
            sample().put(store)
            tier_of(store, 0, promote=True)
            if path is not None:
                flip(file_of(path, sample().key), 100)
            store.discard(sample().key)
            assert store.stats().device.bytes == 0
            assert store.open(sample().key) is None
            assert store.stats().damaged == 1


def test_what_was_deleted_meanwhile_does_not_come_up(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        one = sample()
        one.put(store)
        store.set_document("d", [one.key])
        with store.open(one.key) as reader:
            store.delete_document("d")
            reader.promote()
        assert store.open(one.key) is None
        assert store.stats().device.chunks == 0


@pytest.mark.parametrize("end", ["delete", "close"])
def test_what_is_deleted_while_it_is_copied_does_not_come_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    store = opened(tmp_path)
    one = sample()
    one.put(store)
    store.set_document("d", [one.key])
    device = store.tier("device")
    take = torch.empty
    seen: list[int] = []

    def empty(*args: object, **kwargs: object) -> torch.Tensor:
        seen.append(device.stats().bytes)
        if end == "delete":
            store.delete_document("d")
        else:
            store.close()
        return take(*args, **kwargs)

    with store.open(one.key) as reader, monkeypatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        reader.promote()
    assert seen == [ROWS], "memory counts from before it is taken"
    stats = device.stats()
    assert (stats.chunks, stats.bytes) == (0, 0)
    store.close()


def test_a_device_without_memory_leaves_chunks_below(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(tmp_path) as store:
        sample().put(store)

        def full(*args: object, **kwargs: object) -> torch.Tensor:
            raise torch.OutOfMemoryError("full")

        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", full)
            assert tier_of(store, 0, promote=True) == "host"
            with pytest.raises(BudgetError, match="lower device_budget"):
                store.tier("device").admit(store.whole(sample().key))
        assert store.stats().device.bytes == 0
        assert [tier_of(store, 0, promote=True) for _ in range(2)] == ["host", "device"]


@pytest.mark.parametrize("below", ["host", "disk"])
def test_a_use_on_the_device_counts_below(tmp_path: Path, below: str) -> None:
    size = 81920  # of a sample's file
    budgets = {"host_budget": 2 * ROWS} if below == "host" else {"disk_budget": 2 * size}
    with opened(tmp_path, pin_memory=False, **budgets) as store:
        sample(0).put(store)
        tier_of(store, 0, promote=True)
        sample(1).put(store)
        assert tier_of(store, 0) == "device"
        sample(2).put(store)
        store.tier("device").remove(sample(0).key)
        if below == "host":
            assert [tier_of(store, seed) for seed in range(2)] == ["host", "disk"]
        else:
            assert [file_of(tmp_path, sample(seed).key).exists() for seed in range(3)] == [True, False, True]


def test_readers_outlive_the_store(tmp_path: Path) -> None:
    store = opened(tmp_path)
    sample().put(store)
    tier_of(store, 0, promote=True)
    reader = store.open(sample().key)
    store.close()
    assert sample().matches(reader)
    reader.close()
    reader.close()


def test_threads_share_the_tier_within_its_budget(tmp_path: Path) -> None:
    samples = [sample(seed) for seed in range(5)]
    wrong: list[object] = []
    tiers: list[str] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        try:
            for _ in range(60):
                one = rng.choice(samples)
                if rng.random() < 0.1:
                    store.discard(one.key)
                one.put(store)
                reader = store.open(one.key)
                if reader is None:
                    continue  # set aside by another thread
                with reader:
                    if not one.matches(reader):
                        wrong.append(one.key)
                    reader.promote()
                    tiers.append(reader.tier)
                if store.stats().device.bytes > 2 * ROWS:
                    wrong.append("over budget")
        except Exception as error:
            wrong.append(error)

    with opened(None, 2 * ROWS) as store:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        assert wrong == []
        assert {"host", "device"} <= set(tiers)
        assert store.stats().device.pinned == 0


def test_bad_settings_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="device_budget is 'much'"):
        ChunkStore(tmp_path, device_budget="much")
    with pytest.raises(ValueError, match="device is 'meta'"):
        ChunkStore(tmp_path, device_budget=1, device="meta")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no CUDA device"):
            ChunkStore(tmp_path, device_budget="1GiB")
    with ChunkStore(tmp_path, device_budget=0, device="meta") as store:
        assert store.stats().device is None


@pytest.mark.gpu
@pytest.mark.parametrize("codec", ["exact", "int4"])
def test_rows_on_a_gpu_are_those_of_the_file(codec: str) -> None:
    one = sample()
    gc.collect()  # so that nothing is given back between the two looks at the allocator
    with ChunkStore(None, codec=codec, device_budget="64MiB") as store:
        one.put(store)
        before = torch.cuda.memory_allocated()
        with store.open(one.key) as reader:
            below = [reader.read(layer, 150).clone() for layer in range(3)]
            reader.promote()
        taken = torch.cuda.memory_allocated() - before
        assert store.stats().device.bytes == taken > 0, "the budget counts what torch's allocator takes"
        with store.open(one.key) as reader:
            assert reader.tier == "device"
            assert all(torch.equal(reader.read(layer, 150).cpu(), below[layer]) for layer in range(3))
            assert reader.device == torch.device("cuda", torch.cuda.current_device())


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 2000, 4600, 9000])
def test_the_budget_counts_no_less_than_the_allocator_takes(tokens: int) -> None:
    """Less would let chunks take more of the card than `device_budget`; sizes on both sides of where its pools change."""
    one = sample(tokens=tokens)
    gc.collect()
    with ChunkStore(None, device_budget="64MiB") as store:
        one.put(store)
        before = torch.cuda.memory_allocated()
        with store.open(one.key) as reader:
            reader.promote()
        taken = torch.cuda.memory_allocated() - before
        assert 0 < taken <= store.stats().device.bytes


@pytest.mark.gpu
@pytest.mark.parametrize("gone", ["evicted", "deleted"])
def test_memory_that_a_stream_still_reads_is_not_filled_anew(gone: str) -> None:
    """Readers are closed while kernels that read their rows are queued; other chunks then take the memory."""
    tokens = 60_000  # 28 MiB, so that the same memory is found again at once
    one, other = sample(0, tokens=tokens), sample(1, tokens=tokens)
    side = torch.cuda.Stream()
    with ChunkStore(None, host_budget="1GiB", device_budget="30MiB") as store:
        one.put(store)
        other.put(store)
        for _ in range(2):  # the second time all that is slow has been done once
            for mine, next_ in ((one, other), (other, one)):
                with store.open(mine.key) as reader:
                    wanted = reader.read(0, tokens).cpu()
                    reader.promote()
                reader = store.open(mine.key)
                assert reader.tier == "device"
                rows = reader.read(0, tokens)
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    torch.cuda._sleep(200_000_000)
                    there = rows.clone()
                torch.cuda.current_stream().wait_stream(side)
                reader.close()
                address = rows.data_ptr()
                del rows
                if gone == "deleted":
                    store.free_unheld(mine.key)
                with store.open(next_.key) as reader:
                    reader.promote()
                with store.open(next_.key) as reader:
                    assert reader.tier == "device"
                    assert reader.addresses[0] == address, "the test is about memory that is used again"
                    got = reader.read(0, tokens).cpu()
                with store.open(next_.key) as reader:
                    assert reader.tier == "device"
                torch.cuda.synchronize()
                assert torch.equal(there.cpu(), wanted)
                assert got.numel() == wanted.numel()
                store.tier("device").remove(next_.key)
                if gone == "deleted":
                    mine.put(store)
