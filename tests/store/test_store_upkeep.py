"""Groups, pruning, tenants and usage over processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from faulty_disk import Fault, faulty_disk
from store_samples import file_of, sample

from cachetune_store import ChunkKey, ChunkStore, TenantStats


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "kv"


def foreign(path: Path, digest: str = "ab" * 32) -> Path:
    """A file as a later release might write it: same container, another version, a key of its own."""
    meta = {"format": "cachetune-chunk", "format_version": "9", "key": digest}
    head = json.dumps({"__metadata__": meta}).encode().ljust(4088)
    file = file_of(path, ChunkKey(digest))
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(len(head).to_bytes(8, "little") + head)
    return file


def test_groups_say_what_was_made_alike(path: Path) -> None:
    with ChunkStore(path) as store:
        for seed in range(3):
            sample(seed).put(store)
        sample(0, model="other").put(store)
    with ChunkStore(path, codec="int8") as store:
        sample(9).put(store)
        found = [(g.namespace.model, g.codec, g.chunks) for g in store.groups()]
        assert sorted(found) == [("model", "exact", 3), ("model", "int8", 1), ("other", "exact", 1)]
        disk = store.stats().disk
        assert disk is not None
        assert sum(g.bytes for g in store.groups()) == disk.bytes


@pytest.mark.parametrize("on_disk", [True, False])
def test_prune_removes_what_is_not_kept_and_nothing_else(path: Path, on_disk: bool) -> None:
    with ChunkStore(path if on_disk else None) as store:
        good, stale = sample(1), sample(2, model="old")
        good.put(store, text="good")
        stale.put(store, text="stale")
        dry = store.prune(lambda head: head.namespace.model == "model", dry_run=True)
        assert store.contains(stale.key)
        done = store.prune(lambda head: head.namespace.model == "model")
        assert done == dry
        assert (done.chunks, done.foreign) == (1, 0)
        assert done.bytes > 0
        assert not store.contains(stale.key)
        with store.open(good.key) as reader:  # type: ignore[union-attr]
            assert good.matches(reader)
        assert [text for _, text, _ in store.texts()] == ["good"]


def test_files_of_another_version_are_left_alone_and_reported(path: Path) -> None:
    with ChunkStore(path) as store:
        one = sample(1)
        one.put(store)
        file = foreign(path)
        assert store.verify().foreign == 1
        assert store.verify().ok
        assert store.rebuild_index().foreign == 1
        assert store.prune(lambda head: True).foreign == 0
        assert file.exists()
        assert store.prune(lambda head: True, foreign_too=True).foreign == 1
        assert not file.exists()
        assert store.contains(one.key)


def test_a_file_that_cannot_be_read_is_told_and_left_alone(path: Path) -> None:
    with ChunkStore(path) as store:
        one = sample()
        one.put(store)
        with faulty_disk(path / "chunks", Fault("ENOMEM", ("preadv",))):
            report = store.verify()
        assert (report.ok, report.damaged, report.unreadable, report.checked) == (False, (), (one.key,), 0)
        assert report.as_dict()["unreadable"] == [one.key.digest]
        assert store.verify().ok
        assert store.contains(one.key)


def test_a_version_damaged_in_place_is_damage(path: Path) -> None:
    one = sample(1)
    with ChunkStore(path, host_budget=0) as store:
        one.put(store)
        file = file_of(path, one.key)
        data = file.read_bytes()
        at = data.index(b'format_version":"2"') + len('format_version":"')
        file.write_bytes(data[:at] + b"3" + data[at + 1 :])
        report = store.verify()
        assert (report.damaged, report.foreign) == ((one.key,), 0)
        assert not store.contains(one.key)


@pytest.mark.parametrize("in_memory", [False, True])
def test_what_each_tenant_has(path: Path, in_memory: bool) -> None:
    with ChunkStore(None if in_memory else path) as store:
        sizes = {}
        for tenant, seeds in (("a", (1, 2)), ("", (1,))):
            ours = [sample(seed, tenant=tenant) for seed in seeds]
            sizes[tenant] = sum(one.put(store) for one in ours)
            store.set_document("doc", [ours[0].key], tenant=tenant)
        store.set_document("gone", [sample(9, tenant="c").key], tenant="c")
        expected = [TenantStats("a", 1, 2, sizes["a"]), TenantStats("", 1, 1, sizes[""]), TenantStats("c", 1, 0, 0)]
        assert store.tenants() == store.tenants(store.groups()) == expected
        store.delete_tenant("a")
        assert store.tenants() == expected[1:]


def test_deleting_a_tenant_takes_all_of_it_and_nothing_else(path: Path) -> None:
    with ChunkStore(path) as store:
        mine, loose, other = sample(1, tenant="a"), sample(2, tenant="a"), sample(1, tenant="b")
        for one in (mine, loose, other):
            one.put(store, text="text")
        store.set_document("doc", [mine.key], tenant="a")
        store.set_document("doc", [other.key], tenant="b")
        assert store.delete_tenant("a") > 0
        assert store.documents(tenant="a") == []
        assert not store.contains(mine.key)
        assert not store.contains(loose.key)
        assert store.contains(other.key)
        assert [info.id for info in store.documents(tenant="b")] == ["doc"]


def test_usage_adds_up_over_processes(path: Path) -> None:
    one = sample(1)
    with ChunkStore(path, host_budget=0) as store:
        one.put(store)
    for _ in range(2):
        with ChunkStore(path, host_budget=0) as store:
            with store.open(one.key) as reader:  # type: ignore[union-attr]
                assert one.matches(reader)
            now = store.stats()
    assert now.disk is not None
    assert now.disk.hits == 1
    lifetime = now.lifetime["disk"]
    assert lifetime.hits == 2
    assert lifetime.bytes_written == file_of(path, one.key).stat().st_size
    assert lifetime.read_seconds["count"] == 2
    assert 0 < (lifetime.read_seconds["p50"] or 0) <= (lifetime.read_seconds["p99"] or 0)
    with ChunkStore(path) as store:
        assert store.stats().lifetime["disk"].hits == 2
        store.rebuild_index()
        assert store.stats().lifetime["disk"].hits == 0
