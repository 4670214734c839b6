"""Chunks, documents and notes in a place that many machines share."""

from __future__ import annotations

import os
import shutil
import sqlite3
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from read_only_folder import make_read_only
from shared_places import Place, eventually, valkey_place
from store_samples import Sample, sample

from cachetune_store import (
    ChunkStore,
    DamagedChunkError,
    StoreArgumentError,
    StoreError,
    StorePathError,
    StoreReadOnlyError,
    StoreVersionError,
    changes_so_far,
)
from cachetune_store.diskindex import DiskIndex
from cachetune_store.errors import MissingObjectError, RemoteError
from cachetune_store.remote import catalogue, sync
from cachetune_store.remote.changes import change_name
from cachetune_store.remote.objects import Buffer, Objects
from cachetune_store.remote.outbox import tellable

S3, VALKEY = "s3://bucket/x", "valkey://127.0.0.1:1/x"


def objects_of(place: Place, prefix: str) -> list[str]:
    return sorted(place.objects.names(prefix))


def tier_of(store: ChunkStore, seed: int) -> str | None:
    reader = store.open(sample(seed).key)
    if reader is None:
        return None
    with reader:
        assert sample(seed).matches(reader)
        return reader.tier


def fill(store: ChunkStore, name: str, *seeds: int, tenant: str = "") -> None:
    """Store chunks with their texts, and a document that holds them."""
    for seed in seeds:
        sample(seed, tenant=tenant).put(store, text=f"text {seed}")
    store.set_document(name, [sample(seed, tenant=tenant).key for seed in seeds], tenant=tenant)


@pytest.mark.parametrize("directory", [True, False])
def test_another_machine_finds_chunks_documents_and_texts(place: Place, tmp_path: Path, directory: bool) -> None:
    first = place.store(tmp_path / "first" if directory else None)
    fill(first, "d", 1, 2)
    first.sync()
    for path in (tmp_path / "second", None):
        other = place.store(path)
        assert [info.id for info in other.documents()] == ["d"]
        assert {text for _, text, _ in other.texts()} == {"text 1", "text 2"}
        assert other.contains(sample(1).key, lasting=True)
        assert other.stats().remote.bytes_read == 0, "no chunk is read for that"
        assert tier_of(other, 1) == "remote"


@pytest.mark.parametrize("codec", ["exact", "int4"])
def test_a_chunk_comes_back_as_the_codec_of_the_place_makes_it(place: Place, tmp_path: Path, codec: str) -> None:
    first = place.store(tmp_path / "first", remote_codec=codec)
    one = sample(3)
    one.put(first)
    first.sync()
    with first.open(one.key) as reader:
        assert (reader.tier, reader.layout.codec) == ("host", "exact"), "only the remote tier has its own codec"
    with place.store(tmp_path / "second").open(one.key) as reader:
        assert (reader.tier, reader.layout.codec) == ("remote", codec)
        assert one.matches(reader)


def test_rows_that_are_skipped_are_not_fetched(network: Place) -> None:
    one = sample(1, tokens=3000, layers=4)
    fill_store = network.store()
    one.put(fill_store)
    with network.store().open(one.key) as reader:
        before = network.proxy.answered
        for layer in range(4):
            reader.read(layer, 128)
        fetched = network.proxy.answered - before
        rows = 4 * reader.head.plan.rows[0].size(128)
        assert rows <= reader.bytes_read <= rows + 4 * 8192, "rounded to pages"
        assert fetched < rows + 4 * 8192 + 8000, "and what HTTP says besides"
        assert fetched < reader.head.plan.total / 10


def test_ranges_of_an_object_fill_the_memory_that_is_given(place: Place) -> None:
    objects, content = place.objects, bytes(range(256)) * 400
    objects.put("one", [content])
    cases = [(0, 7), (90_000, 20_000), (300, 5), (len(content) - 3, 9), (len(content), 4), (len(content) + 50, 4)]
    for wanted in (cases, *([each] for each in cases)):
        areas = [memoryview(bytearray(b"!" * size)) for _, size in wanted]
        counts = objects.read("one", [start for start, _ in wanted], areas)
        for (start, size), area, count in zip(wanted, areas, counts, strict=True):
            found = content[start : start + size]
            assert (count, bytes(area[:count])) == (len(found), found), (start, size)
    with pytest.raises(MissingObjectError, match="there is no "):
        objects.read("none", [0, 5], [memoryview(bytearray(4)), memoryview(bytearray(4))])


def test_a_client_of_valkey_that_fills_no_buffers_gives_the_same_rows(
    valkey_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cachetune_store.remote import glide

    place = valkey_place(valkey_port)
    sample(1).put(place.store())
    real, asked = glide.RangeClient.getrange, []
    monkeypatch.setattr(glide.RangeClient, "getrange", lambda self, *given: asked.append(given) or real(self, *given))
    for fills in (True, False):
        monkeypatch.setattr(glide, "_FILLS", fills)
        with place.store(host_budget=0).open(sample(1).key) as reader:
            assert sample(1).matches(reader)
        assert bool(asked) is not fills, "this version of the client fills buffers"
    place.close()


def test_a_client_of_valkey_that_answers_otherwise_is_named(valkey_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from cachetune_store.remote import glide

    place = valkey_place(valkey_port)
    sample(1).put(place.store())
    store = place.store(host_budget=0)
    monkeypatch.setattr(glide, "_FILLS", True)
    monkeypatch.setattr(glide.RangeClient, "_execute_command", lambda *_given, **_options: None)
    with pytest.raises(RemoteError, match="valkey-glide-sync answers None to a read into memory"):
        place.objects.read("any", [0], [memoryview(bytearray(4))])
    monkeypatch.undo()
    assert tier_of(store, 1) == "remote"
    place.close()


@pytest.mark.parametrize("name", ["../secret", "chunks//one", "/etc/passwd", "chunks/.."])
def test_a_name_never_leads_out_of_a_shared_folder(folder: Place, tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    folder.store()
    with pytest.raises(RemoteError, match="no name of an object"):
        folder.objects.get(name, 100)


def test_the_case_of_a_scheme_is_free(tmp_path: Path) -> None:
    with ChunkStore(f"FILE://{tmp_path}/new") as store:
        sample(1).put(store)
    with ChunkStore(f"file://{tmp_path}/new") as store:
        assert tier_of(store, 1) == "remote"


@pytest.mark.parametrize("planted", ["link", "pipe", "folder"])
def test_only_plain_files_of_a_shared_folder_are_read(folder: Place, tmp_path: Path, planted: str) -> None:
    sample(1).put(folder.store())
    (name,) = objects_of(folder, "chunks/")
    file = tmp_path / "shared" / name
    file.rename(tmp_path / "elsewhere")
    if planted == "link":
        file.symlink_to(tmp_path / "elsewhere")
    elif planted == "pipe":
        os.mkfifo(file)
    else:
        file.mkdir()
    store = folder.store()
    assert tier_of(store, 1) is None, "it counts as missing"
    sample(1).put(store)
    store.sync()
    assert tier_of(folder.store(), 1) == "remote", "and is stored again"
    assert not file.is_symlink()


def spread(one: Sample) -> torch.Tensor:
    """Deviations of a chunk of 32 layers with two heads."""
    return torch.rand(len(one.token_ids), 2 * 2 * 32, generator=torch.Generator().manual_seed(1)).half()


def put_with_deviations(store: ChunkStore, one: Sample) -> None:
    store.put(
        one.key, one.layers, one.scores, namespace=one.namespace, token_ids=one.token_ids, deviations=spread(one)
    )  # fmt: skip
    store.sync()


def test_deviations_are_fetched_when_they_are_asked_for(network: Place) -> None:
    one = sample(1, tokens=600, layers=32)
    put_with_deviations(network.store(), one)
    store, size = network.store(host_budget=0), spread(one).nbytes
    before = network.proxy.answered
    with store.open(one.key) as reader:
        head = store.size_of(one.key) - reader.head.plan.total - size
        assert network.proxy.answered - before < head + 8000, "and what HTTP says besides"
        assert head < size / 2
        reader.read(0, 64)
        before = network.proxy.answered
        assert torch.equal(reader.deviations, spread(one))
        assert size <= network.proxy.answered - before < size + 8192 + 8000
        assert one.matches(reader)


def test_deviations_that_cannot_be_fetched_are_told(network: Place) -> None:
    one = sample(1, tokens=600, layers=32)
    put_with_deviations(network.store(), one)
    store = network.store(host_budget=0)
    with store.open(one.key) as reader:
        network.proxy.fault = "refuse"
        network.proxy.cut()
        with pytest.raises(DamagedChunkError, match="deviations can't be read"):
            _ = reader.deviations
        network.proxy.fault = ""
    errors: list[StoreError] = []
    assert store.open(one.key, errors=errors) is None
    assert isinstance(errors[0], RemoteError), "the place is left alone for a while"
    assert not store.discard(one.key), "nothing says that the object is damaged"
    assert store.stats().remote.failed == 1


def test_damaged_deviations_are_deleted_in_the_place(place: Place) -> None:
    one = sample(1, tokens=600, layers=32)
    store = place.store(host_budget=0)
    put_with_deviations(store, one)
    (name,) = place.objects.names("chunks/")
    content = bytearray(place.objects.get(name, 1 << 30))
    content[-spread(one).nbytes + 100] ^= 1
    place.objects.put(name, [bytes(content)])
    with store.open(one.key) as reader:
        assert one.matches(reader)
        with pytest.raises(DamagedChunkError):
            _ = reader.deviations
    assert store.discard(one.key)
    assert store.open(one.key) is None
    assert store.stats().damaged == 1
    put_with_deviations(store, one)
    with store.open(one.key) as reader:
        assert torch.equal(reader.deviations, spread(one))


def test_small_layers_are_fetched_together(network: Place) -> None:
    one = sample(1, tokens=100, layers=6)
    one.put(network.store())
    asked = []
    with network.store(host_budget=0).open(one.key) as reader:
        real = reader._remote._objects.read  # noqa: SLF001 (requests are counted)
        reader._remote._objects.read = lambda *given: asked.append(given) or real(*given)  # noqa: SLF001
        assert one.matches(reader)
    assert len(asked) == 1


def test_what_was_read_whole_is_kept_in_memory_and_on_disk(place: Place, tmp_path: Path) -> None:
    fill(place.store(), "d", 1)
    store = place.store(tmp_path / "second", direct_io=False)
    assert tier_of(store, 1) == "remote"
    assert tier_of(store, 1) == "host"
    store.tier("host").remove(sample(1).key)
    eventually(lambda: store.tier("disk").contains(sample(1).key))
    assert tier_of(store, 1) == "disk"
    store.sync()
    assert len(objects_of(place, "chunks/")) == 1, "it is not written back"


def test_a_chunk_that_any_machine_has_stored_is_not_stored_again(place: Place, tmp_path: Path) -> None:
    fill(place.store(), "d", 1)
    store = place.store(tmp_path / "second")
    fill(store, "e", 1)
    store.sync()
    assert len(objects_of(place, "chunks/")) == 1
    assert store.stats().disk.chunks == 0


def test_changes_of_others_are_seen_by_themselves(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sync, "POLL_SECONDS", 0.1)
    first, second = place.store(tmp_path / "first"), place.store(tmp_path / "second")
    fill(first, "d", 1)
    eventually(lambda: tier_of(second, 1) is not None and len(second.documents()) == 1)
    revision = second.revision()
    second.delete_document("d")
    assert second.revision() > revision
    eventually(lambda: not first.documents() and tier_of(first, 1) is None)
    assert list(first.texts()) == []


def test_a_document_that_is_removed_is_gone_everywhere(place: Place, tmp_path: Path) -> None:
    first, second = place.store(tmp_path / "first"), place.store(tmp_path / "second")
    fill(first, "d", 1, 2)
    fill(first, "e", 2, 3)
    first.sync()
    second.sync()
    assert tier_of(second, 1) == "remote"
    second.close()  # it is away meanwhile
    first.delete_document("d")
    first.sync()
    assert len(objects_of(place, "chunks/")) == 2
    again = place.store(tmp_path / "second")
    for store in (first, again, place.store()):
        store.sync()
        assert [info.id for info in store.documents()] == ["e"]
        assert [store.contains(sample(seed).key) for seed in (1, 2, 3)] == [False, True, True]
        assert {text for _, text, _ in store.texts()} == {"text 2", "text 3"}


def test_replacing_a_document_frees_its_chunks_everywhere(folder: Place, tmp_path: Path) -> None:
    first, second = folder.store(tmp_path / "first"), folder.store()
    fill(first, "d", 1)
    first.sync()
    second.sync()
    fill(second, "d", 2)
    first.sync()
    assert tier_of(first, 1) is None
    assert tier_of(first, 2) == "remote"


def test_a_chunk_stays_if_another_machine_has_just_given_it_to_a_document(folder: Place, tmp_path: Path) -> None:
    first, second = folder.store(tmp_path / "first"), folder.store()
    fill(first, "d", 1)
    first.sync()
    second.sync()
    second.set_document("e", [sample(1).key])  # told at once; the first doesn't know of it yet
    first.delete_document("d")
    first.sync()
    assert [info.id for info in first.documents()] == ["e"]
    assert tier_of(folder.store(), 1) == "remote"
    assert first.contains(sample(1).key, lasting=True)


def test_what_was_removed_elsewhere_does_not_come_back_by_a_chunk_that_is_added(folder: Place, tmp_path: Path) -> None:
    first, second = folder.store(tmp_path / "first"), folder.store()
    fill(first, "d", 1)
    first.sync()
    second.sync()
    sample(2).put(first, text="late")
    number = changes_so_far()
    second.delete_document("d")
    first.extend_document("d", [sample(2).key], since=number)
    first.sync()
    second.sync()
    assert first.documents() == second.documents() == []


def test_the_later_of_two_replacements_holds_everywhere(folder: Place, tmp_path: Path) -> None:
    first, second = folder.store(tmp_path / "first"), folder.store()
    fill(first, "d", 1)
    fill(second, "d", 2)
    for store in (first, second, first):
        store.sync()
    held = [[info.chunks for info in store.documents()] for store in (first, second, folder.store())]
    assert held[0] == held[1] == held[2]


def test_two_that_store_the_same_chunk_keep_one_object(place: Place, tmp_path: Path) -> None:
    first, second = place.store(tmp_path / "first"), place.store(tmp_path / "second")
    fill(first, "d", 1)
    sample(1).put(second, text="text 1")
    for store in (first, second, first):
        store.sync()
    assert len(objects_of(place, "chunks/")) == 1
    assert first.stats().remote.chunks == second.stats().remote.chunks == 1
    assert tier_of(place.store(), 1) == "remote"


def test_many_writers_lose_nothing(place: Place, tmp_path: Path) -> None:
    stores = [place.store(tmp_path / str(number) if number % 2 else None) for number in range(4)]
    failed: list[BaseException] = []

    def write(number: int) -> None:
        try:
            for each in range(5):
                fill(stores[number], f"{number}/{each}", 10 * number + each, 99)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    for store in stores:
        store.sync()
    for store in (*stores, place.store()):
        store.sync()
        assert len(store.documents()) == 20
        assert store.stats().remote.chunks == 21
    assert len(objects_of(place, "chunks/")) == 21


def test_snapshots_replace_old_changes(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "SNAPSHOT_EVERY", 4)
    first, behind = place.store(), place.store(tmp_path / "behind")
    fill(first, "secret", 50)
    behind.sync()
    assert [info.id for info in behind.documents()] == ["secret"]
    behind.close()
    first.delete_document("secret")
    for number in range(12):
        fill(first, f"d{number}", number)
    assert objects_of(place, "changes/")[0] > change_name(4)
    raw = [place.objects.get(name, 1 << 20) for name in objects_of(place, "changes/") + objects_of(place, "snapshots/")]
    assert not any(b"secret" in (each or b"") for each in raw)
    for store in (place.store(tmp_path / "behind"), place.store()):
        assert sorted(info.id for info in store.documents()) == sorted(f"d{number}" for number in range(12))
        assert not store.contains(sample(50).key)
        assert tier_of(store, 7) == "remote"


@pytest.mark.parametrize("emptied", [False, True])
def test_what_a_machine_that_was_cut_off_changes_reaches_the_others(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, emptied: bool
) -> None:
    monkeypatch.setattr(catalogue, "SNAPSHOT_EVERY", 4)
    monkeypatch.setattr(sync, "POLL_SECONDS", 3600.0)
    first, behind = place.store(), place.store(tmp_path / "behind")
    fill(first, "early", 50)
    behind.sync()
    if emptied:
        for prefix in ("changes/", "snapshots/", "chunks/"):
            place.objects.delete(objects_of(place, prefix))
        place.objects.delete(["store.json"])
        first = place.store()
    for number in range(12):
        fill(first, f"d{number}", number)
    first.delete_document("d3")
    fill(behind, "late", 60)
    behind.sync()
    expected = {*(f"d{number}" for number in range(12) if number != 3), "late"}
    for store in (first, place.store(), behind):
        store.sync()
        # What the emptied place had, this machine still has.
        assert {info.id for info in store.documents()} - {"early"} == expected
        assert tier_of(store, 60) is not None
        assert not store.contains(sample(3).key)


def test_a_snapshot_brings_nothing_back_that_waits_to_be_removed(
    folder: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalogue, "SNAPSHOT_EVERY", 4)
    first, behind = folder.store(), folder.store(tmp_path / "behind")
    fill(first, "secret", 50)
    behind.sync()
    behind.close()
    with monkeypatch.context() as gone:  # it can't tell the others
        gone.setattr(catalogue.Catalogue, "publish", lambda _: False)
        gone.setattr(catalogue.Catalogue, "catch_up", lambda _, **__: 0)
        behind = folder.store(tmp_path / "behind")
        behind.delete_document("secret")
        behind.close()
    for number in range(12):
        fill(first, f"d{number}", number)
    with monkeypatch.context() as silent:
        silent.setattr(catalogue.Catalogue, "publish", lambda _: False)
        behind = folder.store(tmp_path / "behind")
        behind.sync()
        assert len(behind.documents()) == 12, "the snapshot was read"
        assert not behind.contains(sample(50).key)
        assert "text 50" not in {text for _, text, _ in behind.texts()}
    behind.sync()
    first.sync()
    for store in (behind, first, folder.store()):
        assert len(store.documents()) == 12
        assert not store.contains(sample(50).key)
        assert "text 50" not in {text for _, text, _ in store.texts()}
    assert not [name for name in objects_of(folder, "chunks/") if sample(50).key.digest in name]


def test_notes_are_agreed_on(place: Place, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, second = place.store(tmp_path / "first"), place.store()
    name = "ab" * 32
    assert first.note(name) is None
    assert first.settle_note(name, b"first", tenant="t") == b"first"
    assert second.settle_note(name, b"second", tenant="t") == b"first"
    assert place.store(tmp_path / "third").note(name, tenant="t") == b"first"
    assert second.note(name) is None, "each tenant has its own"
    first.close()
    with ChunkStore(tmp_path / "first") as alone:
        assert "on this machine alone" in caplog.text
        assert alone.note(name, tenant="t") == b"first", "a copy stays"
        alone.settle_note("cd" * 32, b"before it was shared")
    place.store(tmp_path / "first").note("cd" * 32)
    assert second.note("cd" * 32) == b"before it was shared"


def test_a_tenant_is_deleted_everywhere(folder: Place, tmp_path: Path) -> None:
    first, second = folder.store(tmp_path / "first"), folder.store()
    fill(first, "d", 1, tenant="t")
    sample(2, tenant="t").put(first)  # in no document
    fill(first, "d", 1, tenant="u")
    first.settle_note("ab" * 32, b"note", tenant="t")
    first.sync()
    second.delete_tenant("t")
    first.sync()
    second.sync()
    assert first.documents(tenant="t") == second.documents(tenant="t") == []
    for store in (first, second):
        found = [store.contains(sample(seed, tenant=name).key) for seed, name in ((1, "t"), (2, "t"), (1, "u"))]
        assert found == [False, False, True]
    assert len(objects_of(folder, "chunks/")) == 1
    assert objects_of(folder, "notes/") == []


def test_a_lost_index_is_filled_from_the_place_again(folder: Place, tmp_path: Path) -> None:
    fill(folder.store(), "d", 1, 2)
    folder.store(tmp_path / "second").close()
    for file in (tmp_path / "second" / "index").iterdir():
        file.unlink()
    again = folder.store(tmp_path / "second")
    assert [info.id for info in again.documents()] == ["d"]
    assert tier_of(again, 2) == "remote"
    again.rebuild_index()
    again.sync()
    assert tier_of(again, 1) == "remote"


def test_a_lost_index_brings_no_document_back_that_was_removed_elsewhere(
    folder: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalogue, "SNAPSHOT_EVERY", 4)
    store, other = folder.store(tmp_path / "kv"), folder.store()
    fill(store, "kept", 1)
    fill(store, "secret", 2)
    store.sync()
    store.close()
    other.sync()
    other.delete_document("secret")
    for number in range(12):  # so that no change says any more that it was there
        fill(other, "other", 10 + number)
    for file in (tmp_path / "kv" / "index").iterdir():
        file.unlink()
    again = folder.store(tmp_path / "kv")
    assert sorted(info.id for info in again.documents()) == ["kept", "other"]
    again.rebuild_index()
    again.sync()
    assert sorted(info.id for info in again.documents()) == ["kept", "other"]
    assert tier_of(again, 1) is not None


@pytest.mark.parametrize("how", ["rebuilt", "damaged", "killed before", "killed after", "killed while filled"])
def test_an_index_that_is_made_anew_still_tells_what_waited(
    folder: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Nothing that was stored or removed while the place could not be reached is forgotten."""
    other = folder.store()
    store = folder.store(tmp_path / "kv")
    fill(store, "gone", 1)
    fill(store, "shared", 2)
    store.sync()
    with monkeypatch.context() as patch:

        def unreachable(*_: object, **__: object) -> None:
            raise RemoteError("it doesn't answer")

        for name in ("get", "put", "read"):
            patch.setattr(type(folder.objects), name, unreachable)
        store.delete_document("gone")
        fill(store, "new", 3)
        database = tmp_path / "kv" / "index" / "cache.db"
        if how == "rebuilt":
            store.rebuild_index()
        store.close()
        if how == "damaged":
            with sqlite3.connect(database) as connection:
                connection.execute("UPDATE Cache SET value = 'x' WHERE key = 'total'")
            connection.close()
        elif how.startswith("killed"):
            killed_while_made_anew(tmp_path / "kv", patch, how)
    again = folder.store(tmp_path / "kv")
    if how == "damaged":
        again.stats()
    again.sync()
    other.sync()
    for each in (again, other, folder.store(tmp_path / "fresh")):
        assert sorted(info.id for info in each.documents()) == ["new", "shared"]
        assert tier_of(each, 3) is not None
        assert not each.contains(sample(1).key)
    assert len(objects_of(folder, "chunks/")) == 2
    if how == "killed before":
        again.rebuild_index()  # from the old one, which was left whole: what it holds is newer than the file
        again.sync()
        assert len(objects_of(folder, "chunks/")) == 2
    assert not (tmp_path / "kv" / "index" / "kept.json").exists()


def killed_while_made_anew(path: Path, patch: pytest.MonkeyPatch, how: str) -> None:
    """A process that makes the index anew ends before the old one is gone, before the new one holds anything, or before it is filled."""

    class Killed(BaseException):
        pass

    def kill(*_: object, **__: object) -> None:
        raise Killed

    where = {"killed before": "_fresh", "killed after": "_connect"}
    with ChunkStore(path) as store, patch.context() as dying:
        if how == "killed while filled":
            dying.setattr("cachetune_store.directory.check_files", kill)
        else:
            dying.setattr(DiskIndex, where[how], kill)
        with pytest.raises(Killed):
            store.rebuild_index()


def test_removals_and_other_threads_do_not_wait_for_uploads(
    folder: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, other = folder.store(tmp_path / "kv"), folder.store()
    fill(store, "secret", 1)
    store.sync()
    real, writing, go = type(folder.objects).put, threading.Event(), threading.Event()

    def slow(objects: Objects, name: str, parts: Sequence[Buffer], *, create: bool = False) -> bool:
        if sample(2).key.digest in name:
            writing.set()
            assert go.wait(60)
        return real(objects, name, parts, create=create)

    monkeypatch.setattr(type(folder.objects), "put", slow)
    fill(store, "large", 2)
    assert writing.wait(60)
    store.delete_document("secret")
    told = threading.Thread(target=store.sync)
    told.start()  # it waits for the chunk, which it is to bring to the place, but tells the rest before
    try:
        eventually(lambda: (other.sync(), [info.id for info in other.documents()])[1] == [])
        assert not other.contains(sample(1).key)
    finally:
        go.set()
        told.join()
    other.sync()
    assert [info.id for info in other.documents()] == ["large"]
    assert tier_of(other, 2) == "remote"
    assert len(objects_of(folder, "chunks/")) == 1


def test_what_is_said_of_one_document_keeps_its_order() -> None:
    key, written, tenant = "a" * 64, "b" * 64, {"tenant": "", "id": "d"}
    outbox: list[tuple[str, dict[str, object]]] = [
        ("1", {"op": "put", **tenant, "chunks": [written]}),
        ("2", {"op": "chunk", "key": key}),
        ("3", {"op": "put", **tenant, "chunks": [key]}),
        ("4", {"op": "del", **tenant}),
        ("5", {"op": "del", "tenant": "", "id": "e"}),
        ("6", {"op": "free", "key": written, "object": "x"}),
    ]
    assert [name for name, _ in tellable(outbox, all_of_it=False)] == ["1", "5", "6"]
    assert [name for name, _ in tellable(outbox, all_of_it=True)] == ["1", "3", "4", "5", "6"]


def test_verify_deletes_what_dead_writers_left(folder: Place, tmp_path: Path) -> None:
    store = folder.store(tmp_path / "first")
    fill(store, "d", 1)
    store.sync()
    key = sample(9).key.digest
    old, new = (f"chunks/{key[:2]}/{key}-{stamp:012x}{'0' * 20}.safetensors" for stamp in (1, int(1000 * time.time())))
    for name in (old, new):
        folder.objects.put(name, [b"x"])
    store.verify()
    assert folder.objects.get(old, 9) is None
    assert folder.objects.get(new, 9) == b"x", "its writer may be about to say so"
    assert tier_of(folder.store(), 1) == "remote"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"remote": "ftp://host/x"}, "valkey://host:6379"),
        ({"remote": 7}, "remote is 7"),
        ({"remote": "file:///tmp/x", "remote_codec": "zip"}, "unknown codec 'zip'"),
        ({"remote": "file:///tmp/x", "remote_timeout": 0}, "remote_timeout is 0"),
        ({"remote": "valkey://host:port"}, "port"),
        ({"remote": "valkey://host:0"}, "port of no server"),
        ({"remote": "file:///proc/x"}, "remote file:///proc/x can't be used .*give a folder"),
        ({"remote_options": "x"}, "remote_options is 'x', a str; use a dict"),
        ({"remote": S3, "remote_options": {"client_options": 3}}, "client_options in remote_options is 3; use a dict"),
        ({"remote": S3, "remote_options": {"retry_config": "x"}}, "retry_config in remote_options is 'x'; use a dict"),
        ({"remote": S3, "remote_options": {"retry_config": {"max_retries": "x"}}}, "remote_options not with it"),
        ({"remote": S3, "remote_options": {7: "x"}}, "remote_options not with it"),
        ({"remote": VALKEY, "remote_options": {"nope": 1}}, "remote_options can't be used with valkey://.*'nope'"),
        ({"remote": VALKEY, "remote_options": {7: 1}}, "remote_options can't be used with valkey://"),
        ({"remote": VALKEY, "remote_options": {"use_tls": 1}}, "remote_options has use_tls: .*leave them out"),
        ({"remote": VALKEY, "remote_options": {"protocol": "x"}}, "remote_options can't be used with valkey://"),
        ({"remote": VALKEY, "remote_options": {"client_name": 7}}, "remote_options can't be used with valkey://"),
    ],
)
def test_what_can_not_be_meant_is_refused(tmp_path: Path, folder: Place, options: dict, words: str) -> None:
    with pytest.raises((StoreArgumentError, StorePathError), match=words):
        ChunkStore(tmp_path / "kv", **options)
    with pytest.raises(StoreArgumentError, match="leave remote out"):
        ChunkStore(folder.url, remote=folder.url)


@pytest.mark.parametrize(
    ("url", "module", "package"),
    [("s3://bucket/x", "bucket", "obstore"), ("valkey://user:secret@host/x", "valkey", "glide_sync")],
)
def test_what_has_to_be_installed_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, url: str, module: str, package: str
) -> None:
    monkeypatch.delitem(sys.modules, f"cachetune_store.remote.{module}", raising=False)
    for name in (package, "glide_shared.exceptions" if package == "glide_sync" else package):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(StoreArgumentError, match=r"pip install 'cachetune-rag\[remote\]'") as error:
        ChunkStore(tmp_path / "kv", remote=url)
    assert "secret" not in str(error.value)


def test_a_place_that_holds_something_else_is_refused(folder: Place, tmp_path: Path) -> None:
    folder.objects.put("store.json", [b'{"name": "something else"}'])
    with pytest.raises(StoreVersionError, match="another prefix"):
        folder.store(tmp_path / "kv")
    folder.objects.put("store.json", [b'{"format": "cachetune-store", "version": 99, "id": "x"}'])
    with pytest.raises(StoreVersionError, match="version 99"):
        folder.store()


def test_a_password_is_not_shown() -> None:
    with pytest.raises(Exception, match="valkey") as error:
        ChunkStore("valkey://user:secret@127.0.0.1:1/x", remote_timeout=0.1).sync()
    assert "secret" not in str(error.value)


def test_a_read_only_directory_takes_no_remote_tier(
    folder: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ChunkStore(tmp_path / "kv").close()
    make_read_only(tmp_path / "kv", monkeypatch)
    with pytest.raises(StoreReadOnlyError, match="give the URL as the store's path"):
        folder.store(tmp_path / "kv")


def test_what_waits_is_not_read_for_each_chunk_that_changes(
    folder: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalogue.Catalogue, "publish", lambda _: False)  # as if the place didn't answer
    store = folder.store(tmp_path / "kv")
    for _ in range(3):
        fill(store, "d", *range(20))
    waiting = [op for _, op in store.tier("remote").catalogue._book.outbox() if op["op"] == "chunk"]  # noqa: SLF001
    assert len(waiting) == 20, "a chunk that waits already is not offered again"
    read: list[str] = []
    real = DiskIndex.get
    monkeypatch.setattr(DiskIndex, "get", lambda index, name: read.append(name) or real(index, name))
    store.delete_document("d")
    of_outbox = [name for name in read if name.startswith("outbox/")]
    assert len(of_outbox) <= 3 * 20, "what waits is not read anew for each chunk"
    monkeypatch.undo()
    store.sync()
    assert folder.store().documents() == []
    assert objects_of(folder, "chunks/") == []
    assert store.tier("remote").catalogue.waiting == 0


def test_users_of_one_folder_tell_each_change_once(folder: Place, tmp_path: Path) -> None:
    # As processes of one machine do: each has its own threads and connections, and all share the folder's index.
    stores = [folder.store(tmp_path / "kv") for _ in range(3)]
    other = folder.store()
    failed: list[BaseException] = []

    def write(number: int) -> None:
        try:
            for each in range(6):
                fill(stores[number], f"{number}/{each}", 10 * number + each, 99)
                fill(other, f"other {number}/{each}", 100 + 10 * number + each)
            stores[number].delete_document(f"{number}/0")
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    for store in (*stores, other):
        store.sync()
    for store in (*stores, other, folder.store()):
        store.sync()
        assert len(store.documents()) == 3 * 5 + 18
        assert store.stats().remote.chunks == 3 * 5 + 1 + 18
    assert len(objects_of(folder, "chunks/")) == 3 * 5 + 1 + 18
    assert sum(store.tier("remote").catalogue.waiting for store in stores) == 0


@pytest.mark.parametrize("waiting", [False, True])
def test_a_copy_of_a_folder_is_another_machine(
    folder: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waiting: bool
) -> None:
    # As images of machines are made.
    with monkeypatch.context() as silent:
        if waiting:
            silent.setattr(catalogue.Catalogue, "publish", lambda _: False)
        first = folder.store(tmp_path / "first")
        fill(first, "both", 1)
        first.close()
        shutil.copytree(tmp_path / "first", tmp_path / "second")
    monkeypatch.setattr(sync, "POLL_SECONDS", 3600.0)
    stores = [folder.store(tmp_path / name) for name in ("first", "second")]
    for number, store in enumerate(stores):
        fill(store, f"d{number}", 10 + number)
    for store in (*stores, *stores):
        store.sync()
    for store in (*stores, folder.store()):
        assert {info.id for info in store.documents()} == {"both", "d0", "d1"}
        assert {text for _, text, _ in store.texts()} == {"text 1", "text 10", "text 11"}
        assert store.stats().remote.chunks == 3
        assert store.tier("remote").catalogue.waiting == 0
    stores[0].delete_document("d1")
    stores[0].sync()
    stores[1].sync()
    assert {info.id for info in stores[1].documents()} == {"both", "d0"}
    assert len(objects_of(folder, "chunks/")) == 2


def test_a_document_of_its_own_stays_where_a_store_joins(folder: Place, tmp_path: Path) -> None:
    fill(folder.store(), "theirs", 1)
    with ChunkStore(tmp_path / "kv") as alone:
        fill(alone, "own", 2)
    store = folder.store(tmp_path / "kv")
    assert {info.id for info in store.documents()} == {"own", "theirs"}
    store.sync()
    assert [info.id for info in folder.store().documents()] == ["theirs"], "it was not told of it"
    fill(store, "own", 2)  # precomputing it again tells it
    store.sync()
    found = folder.store()
    assert {info.id for info in found.documents()} == {"own", "theirs"}
    assert tier_of(found, 2) == "remote"
    assert store.verify().ok
    assert {info.id for info in store.documents()} == {"own", "theirs"}
