"""A shared place that is slow, gone, partial, full or hostile: rows are right or a miss, errors say why, and writes go on later."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from remote_servers import missing, valkey_server
from shared_places import Place, eventually, valkey_place
from store_samples import sample

from cachetune_store import ChunkReader, ChunkStore, DamagedChunkError, StoreError, StorePathError
from cachetune_store.chunk import Chunk
from cachetune_store.errors import RemoteError
from cachetune_store.remote import breaker, catalogue, sync
from cachetune_store.remote.changes import change_name
from cachetune_store.remote.objects import Objects
from cachetune_store.tiers import DiskTier


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Places that failed are asked again soon."""
    monkeypatch.setattr(breaker, "_LONGEST", 0.2)
    monkeypatch.setattr(breaker, "_FIRST", 0.05)
    monkeypatch.setattr(sync, "POLL_SECONDS", 0.05)


def filled(place: Place, *seeds: int) -> None:
    """Store chunks and a document, from another machine."""
    store = place.store()
    for seed in seeds:
        sample(seed).put(store, text=f"text {seed}")
    store.set_document("d", [sample(seed).key for seed in seeds])
    store.close()


def is_right(store: ChunkStore, seed: int) -> bool:
    reader = store.open(sample(seed).key)
    if reader is None:
        return False
    with reader:
        return sample(seed).matches(reader)


def read_all(reader: ChunkReader) -> None:
    for layer in range(3):
        reader.read(layer, 150)


FAULTS = ["refuse", "stall", "reset", "unavailable"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_place_that_fails_costs_a_bounded_wait_and_is_used_again_afterwards(network: Place, fault: str) -> None:
    filled(network, 1)
    store = network.store(host_budget=0)
    network.proxy.fault = fault
    network.proxy.cut()
    errors: list[StoreError] = []
    begun = time.monotonic()
    assert store.open(sample(1).key, errors=errors) is None
    assert time.monotonic() - begun < 10 * network.timeout
    assert [type(error) for error in errors] != []
    assert all(isinstance(error, StorePathError) for error in errors)
    assert store.stats().remote.failed > 0
    network.proxy.fault = ""
    network.proxy.cut()
    eventually(lambda: is_right(store, 1))
    assert store.stats().damaged == 0


@pytest.mark.parametrize("fault", ["stall", "reset"])
def test_a_place_that_fails_while_rows_are_read(network: Place, fault: str) -> None:
    filled(network, 1)
    store = network.store(host_budget=0)
    with store.open(sample(1).key) as reader:
        network.proxy.fault = fault
        network.proxy.cut()
        with pytest.raises(DamagedChunkError, match="can't be read"):
            reader.read(0, 150)
    network.proxy.cut()
    assert not store.discard(sample(1).key), "that says nothing about the chunk"
    network.proxy.fault = ""
    network.proxy.cut()
    eventually(lambda: is_right(store, 1))


def test_chunks_that_can_not_be_read_are_not_passed_over_when_a_tenant_is_deleted(
    folder: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = folder.store()
    for seed in (1, 2, 3):
        sample(seed, tenant="t").put(store)  # in no document
    kind = type(folder.objects)
    real, asked = kind.read, []

    def read(objects: Objects, name: str, *ranges: Any) -> list[int]:
        asked.append(name)
        if len(asked) == 2:
            raise RemoteError("the second request fails")
        return real(objects, name, *ranges)

    with monkeypatch.context() as failing:
        failing.setattr(kind, "read", read)
        with pytest.raises(StorePathError, match="the second request fails"):
            store.prune(lambda head: head.namespace.tenant != "t")
        asked.clear()
        eventually(lambda: store.tier("remote").breaker.closed)
        with pytest.raises(StorePathError, match="the second request fails"):
            store.delete_tenant("t")
    eventually(lambda: store.tier("remote").breaker.closed)
    store.delete_tenant("t")
    assert list(folder.objects.names("chunks/")) == []


def test_while_a_place_is_left_alone_nothing_is_asked_of_it(network: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(breaker, "_FIRST", 60.0)
    monkeypatch.setattr(breaker, "_LONGEST", 60.0)
    filled(network, 1)
    store = network.store(host_budget=0)
    network.proxy.fault = "refuse"
    network.proxy.cut()
    assert store.open(sample(1).key) is None
    network.proxy.fault = ""
    errors: list[StoreError] = []
    assert store.open(sample(1).key, errors=errors) is None
    assert "is not asked for" in str(errors[0])
    store.sync()  # asked for by name, it is tried
    assert is_right(store, 1)


def test_what_is_stored_while_the_place_is_gone_is_written_when_it_is_back(network: Place, tmp_path: Path) -> None:
    store = network.store(tmp_path / "kv")
    network.proxy.fault = "refuse"
    network.proxy.cut()
    sample(1).put(store, text="one")
    store.set_document("d", [sample(1).key])
    with pytest.raises(StorePathError):
        store.sync()
    assert is_right(store, 1)
    network.proxy.fault = ""
    eventually(lambda: [info.id for info in network.store().documents()] == ["d"])
    eventually(lambda: is_right(network.store(), 1))


def test_what_waits_is_written_after_a_restart(
    network: Place, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    network.proxy.fault = "refuse"
    with caplog.at_level(logging.WARNING):
        store = network.store(tmp_path / "kv")
    assert "until it answers" in caplog.text
    sample(1).put(store, text="one")
    store.set_document("d", [sample(1).key])
    store.set_document("e", [sample(1).key])
    store.delete_document("e")
    store.close()
    network.proxy.fault = ""
    network.store(tmp_path / "kv").sync()
    other = network.store()
    assert [info.id for info in other.documents()] == ["d"]
    assert is_right(other, 1)


def test_without_a_directory_a_change_that_can_not_be_told_is_an_error(network: Place) -> None:
    filled(network, 1)
    store = network.store()
    network.proxy.fault = "refuse"
    network.proxy.cut()
    with pytest.raises(StorePathError):
        sample(2).put(store)
    with pytest.raises(StorePathError):
        store.delete_document("d")
    network.proxy.fault = ""
    eventually(lambda: network.store().documents() == [])


def test_bytes_that_the_network_changes_are_not_used(network: Place) -> None:
    filled(network, 1)
    store = network.store(host_budget=0)
    with store.open(sample(1).key) as reader:
        network.proxy.fault = "garbage"
        with pytest.raises(DamagedChunkError):
            read_all(reader)
    network.proxy.fault = ""
    assert not store.discard(sample(1).key), "the object itself is good"
    assert is_right(store, 1)


@pytest.mark.parametrize("where", [100, 5000, 20_000, -5000])
def test_a_damaged_object_is_set_aside_and_stored_again(folder: Place, where: int) -> None:
    filled(folder, 1)
    objects = folder.objects
    name = next(iter(objects.names("chunks/")))
    raw = bytearray(objects.get(name, 1 << 30))
    raw[where] ^= 1
    objects.put(name, [bytes(raw)])
    store = folder.store(host_budget=0)
    errors: list[StoreError] = []
    reader = store.open(sample(1).key, errors=errors)
    if reader is not None:
        with reader, pytest.raises(DamagedChunkError):
            read_all(reader)
        assert store.discard(sample(1).key)
    else:
        assert isinstance(errors[0], DamagedChunkError)
    assert store.stats().remote.damaged == 1
    assert not store.contains(sample(1).key)
    sample(1).put(store, text="text 1")
    other = folder.store()
    assert is_right(other, 1)
    assert len(list(objects.names("chunks/"))) == 1


@pytest.mark.parametrize("kept", [0, 100, 9000, 70_000])
def test_an_object_that_is_too_short_is_set_aside(place: Place, kept: int) -> None:
    filled(place, 1)
    name = next(iter(place.objects.names("chunks/")))
    place.objects.put(name, [place.objects.get(name, 1 << 30)[:kept]])
    store = place.store(host_budget=0)
    reader = store.open(sample(1).key)
    if reader is not None:
        with reader, pytest.raises(DamagedChunkError):
            read_all(reader)
        store.discard(sample(1).key)
    assert not store.contains(sample(1).key)
    remote = store.stats().remote
    assert (remote.damaged, remote.failed) == (1, 0), "the place itself works"


@pytest.mark.parametrize("gone", [False, True])
@pytest.mark.parametrize("directory", [True, False])
def test_an_unusable_object_of_a_document_does_not_come_back(
    folder: Place, tmp_path: Path, directory: bool, gone: bool
) -> None:
    filled(folder, 1)
    name = next(iter(folder.objects.names("chunks/")))
    if gone:
        folder.objects.delete([name])
    else:
        folder.objects.put(name, [bytes(len(folder.objects.get(name, 1 << 30)))])
    store = folder.store(tmp_path / "kv" if directory else None, host_budget=0)
    store.set_document("d", [sample(1).key])
    store.sync()
    assert store.open(sample(1).key) is None
    store.sync()
    assert not store.contains(sample(1).key)
    assert not list(folder.objects.names("chunks/"))
    sample(1).put(store, text="text 1")
    store.sync()
    assert is_right(folder.store(), 1)


def test_a_read_that_fails_is_not_followed_by_another_wait(folder: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(breaker, "_FIRST", 60.0)
    filled(folder, 1)
    store = folder.store(host_budget=0)
    asked: list[str] = []

    def read(_: Objects, name: str, *__: Any) -> list[int]:
        asked.append(name)
        raise RemoteError("it doesn't answer in time")

    with store.open(sample(1).key) as reader:
        monkeypatch.setattr(type(folder.objects), "read", read)
        with pytest.raises(DamagedChunkError, match="can't be read"):
            reader.read(0, 150)
    assert not store.discard(sample(1).key)
    assert len(asked) == 1
    assert store.contains(sample(1).key)


def test_an_object_of_another_chunk_is_set_aside(folder: Place) -> None:
    filled(folder, 1, 2)
    first, second = (
        next(name for name in folder.objects.names("chunks/") if sample(seed).key.digest in name) for seed in (1, 2)
    )
    folder.objects.put(first, [folder.objects.get(second, 1 << 30)])
    store = folder.store()
    assert not is_right(store, 1)
    assert is_right(store, 2)
    assert store.stats().remote.damaged == 1


def test_an_object_that_is_gone_is_a_miss_and_may_be_stored_again(folder: Place) -> None:
    filled(folder, 1)
    store = folder.store()
    folder.objects.delete(list(folder.objects.names("chunks/")))
    errors: list[StoreError] = []
    assert store.open(sample(1).key, errors=errors) is None
    assert errors == []
    assert store.stats().remote.failed == 0
    sample(1).put(store)
    assert is_right(folder.store(), 1)


@pytest.mark.parametrize("content", [b"", b"no gzip", b"\x1f\x8b\x08" + b"x" * 50])
def test_a_change_that_can_not_be_read_is_passed_over(
    folder: Place, tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    filled(folder, 1)
    folder.objects.put(change_name(1), [content])
    other = folder.store(tmp_path / "kv")
    eventually(lambda: "passed over" in caplog.text)
    other.sync()
    assert [info.id for info in other.documents()] == ["d"]


@pytest.mark.parametrize("content", [b"", b"no gzip"])
def test_a_damaged_snapshot_keeps_no_store_from_opening(
    folder: Place, tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(catalogue, "SNAPSHOT_EVERY", 4)
    store = folder.store()
    for seed in range(12):
        sample(seed).put(store, text=f"text {seed}")
        store.set_document(f"d{seed}", [sample(seed).key])
    store.close()
    snapshots = sorted(folder.objects.names("snapshots/"))
    whole = folder.objects.get(snapshots[-2], 1 << 20)
    folder.objects.put(snapshots[-1], [content])
    assert len(folder.store().documents()) == 12, "an older one and the changes after it say the same"

    folder.objects.put(snapshots[-2], [content])
    later = folder.store(tmp_path / "kv")
    assert "and the changes that it adds up are deleted" in caplog.text
    sample(30).put(later, text="text 30")
    later.set_document("late", [sample(30).key])
    assert is_right(later, 30)
    with pytest.raises(StorePathError, match="restore the object"):
        later.sync()  # it would add to a log of which it doesn't know the end

    folder.objects.put(snapshots[-2], [whole])
    later.sync()
    assert len(later.documents()) == len(folder.store().documents()) == 13


def test_a_full_place_stops_no_removal_and_no_answer(tmp_path: Path) -> None:
    if (why := missing("valkey")) is not None:
        pytest.skip(why)
    with valkey_server(maxmemory="8mb", **{"maxmemory-policy": "noeviction"}) as port:
        place = valkey_place(port)
        store = place.store(tmp_path / "kv")
        for seed in range(60):
            sample(seed, tokens=400).put(store)
        store.set_document("d", [sample(seed, tokens=400).key for seed in range(60)])
        with pytest.raises(StorePathError, match="maxmemory"):
            store.sync()
        assert store.stats().remote.failed > 0
        with store.open(sample(59, tokens=400).key) as reader:
            assert sample(59, tokens=400).matches(reader)
        place.close()


def test_a_chunk_that_can_not_be_kept_stops_no_other_one(
    folder: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    filled(folder, 1, 2)
    store = folder.store(tmp_path / "kv", direct_io=False)
    real = DiskTier.admit

    def admit(tier: DiskTier, chunk: Chunk) -> list[Chunk]:
        if chunk.key == sample(1).key:
            raise RuntimeError("can't start new thread")
        return real(tier, chunk)

    monkeypatch.setattr(DiskTier, "admit", admit)
    assert is_right(store, 1)
    assert is_right(store, 2)
    waiting = threading.Thread(target=store.verify, daemon=True)
    waiting.start()
    waiting.join(20)
    assert not waiting.is_alive()
    assert store.tier("disk").contains(sample(2).key)
    assert "can't start new thread" in caplog.text


def test_wrong_credentials_are_an_error_that_says_so(s3_port: int, tmp_path: Path) -> None:
    from remote_servers import BUCKET, s3_options

    wrong = s3_options(s3_port) | {"secret_access_key": "wrong"}
    with pytest.raises(StorePathError, match="check the credentials"):
        ChunkStore(tmp_path / "kv", remote=f"s3://{BUCKET}/x", remote_options=wrong)
