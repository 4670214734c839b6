"""Chunks come back from every tier."""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from store_samples import NAMESPACE, file_of, flip, sample

from cachetune_store import (
    ChunkStore,
    DamagedChunkError,
    NonFiniteError,
    StoreArgumentError,
    StoreClosedError,
    UnknownCodecError,
    disk_reader,
    get_codec,
    make_key,
    pinning,
)
from cachetune_store.buffers import PAGE, SlabPool, private_pages
from cachetune_store.tier_kinds import KINDS, NAMES, kind_of, rank

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


@pytest.mark.parametrize("codec", ["exact", "fp8", "int4", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("tokens", [1, 64, 150])
@pytest.mark.parametrize("tier", ["host", "disk", "memory"])
def test_a_chunk_comes_back_bit_for_bit(path: Path, codec: str, dtype: str, tokens: int, tier: str) -> None:
    one = sample(dtype=dtype, tokens=tokens)
    where, budget = (None if tier == "memory" else path), (0 if tier == "disk" else "1GiB")
    with ChunkStore(where, codec=codec, host_budget=budget) as store:
        assert not store.contains(one.key)
        assert store.open(one.key) is None
        assert one.put(store) > 0
        assert store.contains(one.key)
        with store.open(one.key) as reader:
            assert reader.tier == ("disk" if tier == "disk" else "host")
            assert reader.key == one.key
            assert reader.token_ids.tolist() == one.token_ids
            assert (reader.layout.tokens, reader.layout.codec, reader.layout.dtype) == (tokens, codec, dtype)
            assert one.matches(reader)
            assert reader.bytes_read >= sum(r.numel() for r in (reader.read(i, tokens) for i in range(3)))


@pytest.mark.parametrize(("codec", "error"), [("int8", 0.02), ("fp8", 0.2), ("int4", 0.3)])
def test_quantised_chunks_come_back_close(path: Path, codec: str, error: float) -> None:
    one = sample()
    with ChunkStore(path, codec=codec) as store:
        one.put(store)
        with store.open(one.key) as reader:
            found = get_codec(codec).decode(reader.read(0, 150), reader.layout.layers[0], "float32")
            for numbers, exact in zip(found, one.layers[0], strict=True):
                assert torch.allclose(numbers, exact[reader.order], atol=error)
    with ChunkStore(path, codec="exact") as store, store.open(one.key) as reader:
        assert reader.layout.codec == codec, "a store reads every codec, whatever it writes"


def test_a_put_chunk_survives_reopening(path: Path) -> None:
    with ChunkStore(path) as store:
        size = sample().put(store)
        assert size == file_of(path, sample().key).stat().st_size == SIZE
    with ChunkStore(path) as store, store.open(sample().key) as reader:
        assert reader.tier == "disk"
        assert sample().matches(reader)


def test_putting_twice_changes_nothing(path: Path) -> None:
    with ChunkStore(path) as store:
        assert sample().put(store) == sample().put(store)
        before = file_of(path, sample().key).stat()
        assert store.stats().disk.chunks == 1
        assert store.stats().disk.bytes == before.st_size
        sample().put(store)
        assert file_of(path, sample().key).stat().st_ino == before.st_ino


def test_putting_heals_a_damaged_file(path: Path) -> None:
    with ChunkStore(path, host_budget=0) as store:
        sample().put(store)
        flip(file_of(path, sample().key), 9)
        sample().put(store)
        assert store.stats().damaged == 1
        with store.open(sample().key) as reader:
            assert sample().matches(reader)


def test_keys_and_scores_may_be_views_and_need_no_grad_care(path: Path) -> None:
    one = sample()
    wide = [
        (torch.cat([k, k], 2)[..., :8].requires_grad_(), v.transpose(0, 1).contiguous().transpose(0, 1))
        for k, v in one.layers
    ]
    with ChunkStore(path) as store:
        store.put(one.key, wide, one.scores.double().requires_grad_(), namespace=one.namespace, token_ids=one.token_ids)
        with store.open(one.key) as reader:
            assert one.matches(reader)


def test_what_does_not_belong_together_is_refused(path: Path) -> None:
    one = sample()
    ids, layers, scores = one.token_ids, one.layers, one.scores

    def put(key=one.key, layers=layers, scores=scores, token_ids=ids, namespace=NAMESPACE) -> None:
        store.put(key, layers, scores, namespace=namespace, token_ids=token_ids)

    with ChunkStore(path) as store:
        with pytest.raises(ValueError, match="make_key"):
            put(key=sample(1).key)
        with pytest.raises(ValueError, match="make_key"):
            put(namespace=sample(tenant="other").namespace)
        with pytest.raises(ValueError, match="1 token and 1 layer"):
            put(key=make_key(NAMESPACE, []), token_ids=[])
        with pytest.raises(ValueError, match="1 token and 1 layer"):
            put(layers=[])
        with pytest.raises(ValueError, match="layer 1: keys"):
            put(layers=[layers[0], (layers[1][0][:-1], layers[1][1])])
        with pytest.raises(ValueError, match=r"torch\.bfloat16"):
            put(layers=[(k.bfloat16(), v) for k, v in layers])
        with pytest.raises(ValueError, match="scores have shape"):
            put(scores=scores[:-1])
        with pytest.raises(NonFiniteError, match="ranking"):
            put(scores=scores * float("nan"))
        assert store.stats().disk.chunks == 0
        assert list((path / "chunks").iterdir()) == []


def test_bad_settings_are_refused_by_name(path: Path) -> None:
    with pytest.raises(UnknownCodecError, match="exact, fp8, int4, int8"):
        ChunkStore(path, codec="zip")
    with pytest.raises(ValueError, match="host_budget is 'much'"):
        ChunkStore(path, host_budget="much")
    with pytest.raises(ValueError, match="disk_budget is -5"):
        ChunkStore(path, disk_budget=-5)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no CUDA device"):
            ChunkStore(path, pin_memory=True)


def test_reads_out_of_range_are_refused(path: Path) -> None:
    for budget in ("1GiB", 0):
        with ChunkStore(path, host_budget=budget) as store:
            sample().put(store)
            with store.open(sample().key) as reader:
                for layer, rows in ((3, 1), (-1, 1), (0, 151), (0, -1)):
                    with pytest.raises(ValueError, match="layers 0 to 2 of 150 rows"):
                        reader.read(layer, rows)
            with pytest.raises(StoreClosedError):
                reader.read(0, 1)


def test_a_closed_store_says_so(path: Path) -> None:
    store = ChunkStore(path)
    sample().put(store)
    reader = store.open(sample().key)
    store.close()
    store.close()
    assert sample().matches(reader), "an open chunk stays readable"
    reader.close()
    for use in (store.stats, store.verify, lambda: store.open(sample().key), lambda: sample().put(store)):
        with pytest.raises(StoreClosedError):
            use()


def test_host_reads_are_views(path: Path) -> None:
    with ChunkStore(path) as store:
        sample().put(store)
        with store.open(sample().key) as one, store.open(sample().key) as two:
            assert one.read(0, 100).data_ptr() == two.read(0, 150).data_ptr()


def test_a_full_read_makes_the_next_one_a_host_hit(path: Path) -> None:
    with ChunkStore(path) as store:
        sample().put(store)
    with ChunkStore(path) as store:
        with store.open(sample().key) as reader:
            sample().matches(reader)
        assert store.stats().disk.bytes_read == reader.bytes_read > 0
        with store.open(sample().key) as reader:
            assert reader.tier == "host"
            assert sample().matches(reader)
        stats = store.stats()
        assert (stats.hits, stats.host.hits, stats.disk.hits, stats.host.promotions) == (2, 1, 1, 1)


def test_a_partial_read_promotes_when_asked_only(path: Path) -> None:
    with ChunkStore(path) as store:
        sample().put(store)
    with ChunkStore(path) as store:
        with store.open(sample().key) as reader:
            reader.read(0, 20)
        assert tier_of(store, 0) == "disk"
        with store.open(sample().key) as reader:
            reader.read(0, 20)
            assert reader.promote()
            assert reader.promote()
        with store.open(sample().key) as reader:
            assert reader.tier == "host"
            assert sample().matches(reader)
            assert reader.promote()


def test_a_damaged_chunk_is_not_promoted(path: Path) -> None:
    with ChunkStore(path) as store:
        sample().put(store)
    flip(file_of(path, sample().key), SIZE - 4096)
    with ChunkStore(path) as store:
        with store.open(sample().key) as reader:
            reader.read(0, 150)
            with pytest.raises(DamagedChunkError):
                reader.promote()
            store.discard(sample().key)
        assert store.open(sample().key) is None
        assert store.stats().damaged == 1


def test_a_chunk_that_was_repaired_meanwhile_is_not_set_aside(path: Path) -> None:
    with ChunkStore(path, host_budget=0) as one, ChunkStore(path, host_budget=0) as two:
        sample().put(one)
        file = file_of(path, sample().key)
        flip(file, file.stat().st_size - 5000)
        with one.open(sample().key) as reader, pytest.raises(DamagedChunkError):
            reader.read(2, 150)
        two.discard(sample().key)
        sample().put(two)
        one.discard(sample().key)
        assert (one.stats().damaged, two.stats().damaged) == (0, 1)
        with one.open(sample().key) as reader:
            assert sample().matches(reader)


def test_a_read_that_fails_once_loses_no_chunk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with ChunkStore(path, host_budget=0) as store:
        sample().put(store)
        with store.open(sample().key) as reader, monkeypatch.context() as patch:
            patch.setattr(os, "preadv", fail)
            with pytest.raises(DamagedChunkError, match="can't be read"):
                reader.read(0, 150)
        store.discard(sample().key)
        assert store.stats().damaged == 0
        with store.open(sample().key) as reader:
            assert sample().matches(reader)
    with ChunkStore(path, host_budget=0) as store, monkeypatch.context() as patch:
        patch.setattr(os, "preadv", fail)
        assert store.open(sample().key) is None
        assert store.stats().damaged == 1, "it failed twice"


def test_a_forgotten_reader_lets_go(path: Path) -> None:
    with ChunkStore(path, host_budget=0) as store:
        sample().put(store)
        reader = store.open(sample().key)
        assert store.stats().disk.pinned == 1
        del reader
        assert store.stats().disk.pinned == 0


@pytest.mark.parametrize("budget", [0, "1GiB"])
def test_threads_may_read_and_put_at_once(path: Path, budget: int | str) -> None:
    samples = [sample(seed, layers=6) for seed in range(4)]
    wrong: list[object] = []

    def work(turn: int) -> None:
        try:
            for i in range(12):
                one = samples[(i + turn) % 4]
                one.put(store)
                with store.open(one.key) as reader:
                    if not one.matches(reader):
                        wrong.append(one.key)
        except Exception as error:
            wrong.append(error)

    with ChunkStore(path, host_budget=budget) as store:
        threads = [threading.Thread(target=work, args=(turn,)) for turn in range(4)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        assert wrong == []
        with store.open(samples[0].key) as reader:
            rows: dict[int, torch.Tensor] = {}
            threads = [threading.Thread(target=lambda i=i: rows.update({i: reader.read(i, 100)})) for i in range(6)]
            [thread.start() for thread in threads]
            [thread.join() for thread in threads]
            for index, (k, v) in enumerate(samples[0].layers):
                expected = torch.cat([k.flatten(1), v.flatten(1)], 1)[reader.order].view(torch.uint8)[:100].flatten()
                assert torch.equal(rows[index], expected)


def test_hundreds_of_requests_leak_nothing(path: Path) -> None:
    descriptors = Path("/proc/self/fd")
    with ChunkStore(path, host_budget=0) as store:
        sample().put(store)
        gc.collect()
        before = len(list(descriptors.iterdir()))
        for _ in range(300):
            with store.open(sample().key) as reader:
                reader.read(0, 150)
            assert store.open(sample(1).key) is None
        assert len(list(descriptors.iterdir())) <= before
        assert store.stats().disk.pinned == 0


def test_row_memory_is_reused_but_never_while_it_is_seen() -> None:
    pool = SlabPool(pinned=False, limit=100_000)
    first = pool.allocate(40_000)
    address = first.data_ptr()
    assert address % 4096 == 0
    view = first[5:10]
    del first
    assert pool.idle_bytes == 0
    assert pool.allocate(40_000).data_ptr() != address
    del view
    assert pool.allocate(39_000).data_ptr() in (address, pool.allocate(40_000).data_ptr())
    for size in range(10_000, 60_000, 5000):
        pool.allocate(size)
    assert pool.idle_bytes <= 100_000
    pool.clear()
    pool.allocate(40_000)
    assert pool.idle_bytes == 0


@pytest.mark.gpu
def test_rows_reach_a_gpu_from_pinned_memory(path: Path) -> None:
    one = sample()
    one.layers = [(k.cuda(), v.cuda()) for k, v in one.layers]
    spread = torch.rand(150, 2 * sum(k.shape[1] for k, _ in one.layers)).half()
    with ChunkStore(path) as store:
        store.put(one.key, one.layers, one.scores, namespace=NAMESPACE, token_ids=one.token_ids, deviations=spread)
        with store.open(one.key) as reader:
            assert reader.read(0, 100).is_pinned()
            assert reader.deviations.is_pinned()
    with ChunkStore(path) as store, store.open(one.key) as reader:
        rows = reader.read(0, 150)
        assert rows.is_pinned()
        assert rows.data_ptr() % 4096 == 0
        k, v = one.layers[0]
        expected = torch.cat([k.flatten(1), v.flatten(1)], 1)[reader.order.cuda()].view(torch.uint8).flatten()
        assert torch.equal(rows.cuda(non_blocking=True), expected)


@pytest.mark.gpu
def test_row_memory_that_a_gpu_still_reads_is_not_given_out_again() -> None:
    pool = SlabPool(pinned=True, limit=1 << 30)
    side = torch.cuda.Stream()
    size = 64 << 20
    for round_ in range(5):
        rows = pool.allocate(size).fill_(round_)
        assert rows.is_pinned()
        with torch.cuda.stream(side):
            torch.cuda._sleep(200_000_000)
            there = rows.to("cuda", non_blocking=True)
        del rows
        pool.allocate(size).fill_(255)
        side.synchronize()
        assert bool((there == round_).all())
    assert pool.idle_bytes == size
    pool.clear()
    assert pool.idle_bytes == 0


def test_threads_that_read_the_first_rows_of_a_chunk_together_find_its_memory_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = sample()
    with ChunkStore(tmp_path) as store:
        one.put(store)
    begun, making, go_on = threading.Event(), threading.Event(), threading.Event()
    errors: list[Exception] = []
    real_views, real_fetch = disk_reader.layer_views, disk_reader.DiskReader.fetch

    def views(*args: Any) -> tuple[torch.Tensor, ...]:
        making.set()
        assert go_on.wait(20)
        return real_views(*args)

    def fetch(reader: disk_reader.DiskReader, layer: int, rows: int) -> int:
        if layer == 1:  # it comes while the other one makes ready
            begun.set()
            assert making.wait(20)
        return real_fetch(reader, layer, rows)

    def read(reader: disk_reader.ChunkReader, layer: int) -> None:
        try:
            reader.read(layer, 150)
        except Exception as error:
            errors.append(error)

    monkeypatch.setattr(disk_reader, "layer_views", views)
    monkeypatch.setattr(disk_reader.DiskReader, "fetch", fetch)
    with ChunkStore(tmp_path) as store, store.open(one.key) as reader:
        second, first = (threading.Thread(target=read, args=(reader, layer)) for layer in (1, 0))
        second.start()
        assert begun.wait(20)
        first.start()
        second.join(0.2)  # it waits for the first one, or has failed
        go_on.set()
        first.join()
        second.join()
        assert not errors
        assert one.matches(reader)


def test_memory_that_was_settled_is_given_out_without_waiting_for_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[None] = []
    monkeypatch.setattr(pinning, "pin", lambda area: True)
    monkeypatch.setattr(pinning, "wait_for_copies", lambda: waits.append(None))
    pool = SlabPool(pinned=True, limit=1 << 30)
    for _ in range(3):
        rows = [pool.allocate(1 << 20) for _ in range(4)]
        del rows
        pool.prepare_idle_memory()
        settled = len(waits)
        rows = [pool.allocate(1 << 20) for _ in range(4)]
        assert len(waits) == settled
        del rows
    pool.prepare_idle_memory()
    before = len(waits)
    pool.prepare_idle_memory()
    assert len(waits) == before  # nothing came back meanwhile


def test_memory_is_there_before_it_is_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA would make its pages under a lock for which others wait who want something of the GPU."""
    there: list[int] = []

    def register(address: int, size: int, flags: int) -> int:
        pages = (ctypes.c_ubyte * (size // PAGE))()
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), pages) == 0
        there.append(sum(page & 1 for page in pages))
        return 0

    monkeypatch.setattr(torch.cuda, "cudart", lambda: SimpleNamespace(cudaHostRegister=register))
    area = private_pages(4 << 20)
    area[PAGE] = 7
    assert pinning.pin(area)
    assert there == [len(area) // PAGE]
    assert (area[PAGE], area[2 * PAGE]) == (7, 0)  # what was written stays


def test_settling_waits_for_no_second_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[None] = []
    monkeypatch.setattr(pinning, "pin", lambda area: True)
    monkeypatch.setattr(pinning, "wait_for_copies", lambda: waits.append(None))
    monkeypatch.setattr(pinning, "devices_in_use", lambda: [0, 1])
    pool = SlabPool(pinned=True, limit=1 << 30)
    pool.allocate(1 << 20)
    pool.prepare_idle_memory()
    assert not waits
    pool.allocate(1 << 20)  # who needs it waits
    assert waits


@pytest.mark.parametrize("text", ["short", "x" * (200 << 10)], ids=["short head", "long head"])
def test_the_head_of_a_file_is_read_in_one_go_once_its_length_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    one, two = sample(0), sample(1)
    with ChunkStore(tmp_path) as store:
        one.put(store, text=text)
        two.put(store, text=text)
    with ChunkStore(tmp_path, host_budget=0) as store:
        store.open(one.key).close()
        reads, real = [], os.preadv
        monkeypatch.setattr(os, "preadv", lambda *a: reads.append(a) or real(*a))
        with store.open(two.key) as reader:
            assert len(reads) == 1
            assert two.matches(reader)


@pytest.mark.parametrize("read_memory", [0, "1MiB"])
def test_memory_for_reads_is_kept_up_to_its_budget(tmp_path: Path, read_memory: int | str) -> None:
    one = sample()
    with ChunkStore(tmp_path) as store:
        one.put(store)
    with ChunkStore(tmp_path, host_budget=0, read_memory=read_memory) as store:
        with store.open(one.key) as reader:
            assert one.matches(reader)
        del reader
        kept = store.memory.idle_bytes
    assert kept >= one.layers[0][0].nbytes if read_memory else kept == 0


@pytest.mark.parametrize("pinned", [True, False])
def test_deviations_lie_where_a_gpu_fetches_rows_from(
    path: Path, pinned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    allocate = SlabPool.allocate
    monkeypatch.setattr(SlabPool, "allocate", lambda pool, count: taken.append(count) or allocate(pool, count))
    monkeypatch.setattr("cachetune_store.buffers.pinning.pin", lambda area: True)
    monkeypatch.setattr("cachetune_store.buffers.pinning.unpin", lambda area: None)
    one = sample()
    deviations = torch.rand(150, 2 * sum(k.shape[1] for k, _ in one.layers)).half()
    with ChunkStore(path) as store:
        store.memory.pinned = pinned
        store.put(one.key, one.layers, one.scores, namespace=NAMESPACE, token_ids=one.token_ids, deviations=deviations)
        with store.open(one.key) as reader:
            assert torch.equal(reader.deviations, deviations)
    with ChunkStore(path) as store:
        store.memory.pinned = pinned
        with store.open(one.key) as reader:
            assert reader.tier == "disk"
            assert reader.promote()
        with store.open(one.key) as reader:
            assert reader.tier == "host"
            assert torch.equal(reader.deviations, deviations)
    assert taken.count(deviations.nbytes) == (2 if pinned else 0)


def test_tiers_are_listed_the_fastest_first_and_found_by_name(tmp_path: Path) -> None:
    assert NAMES == ("device", "host", "disk", "remote")
    assert [rank(name) for name in (*NAMES, "elsewhere")] == [0, 1, 2, 3, 4]
    assert [kind_of(name) for name in NAMES] == list(KINDS)
    with pytest.raises(KeyError, match="'elsewhere': use 'device', 'host', 'disk'"):
        kind_of("elsewhere")
    with ChunkStore(tmp_path / "kv", host_budget=0, device="cpu", device_budget="1MiB") as store:
        assert [kind.name for kind in store.tiers] == ["device", "disk"]
        here = [kind.name for kind in KINDS if kind.shared_by != "machines"]
        assert [tier.name for tier in store.stats().tiers] == here
        assert all(store.tier(name).name == name for name in here)
    with ChunkStore(None) as store:
        assert [kind.name for kind in store.tiers] == ["host"]
        with pytest.raises(StoreArgumentError, match="tier is 'disk': this store has 'host'"):
            store.tier("disk")
