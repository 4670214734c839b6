"""An encrypted store: whoever lacks its key finds nothing of its texts and rows in it, and can't change it unseen."""

from __future__ import annotations

import json
import multiprocessing
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shared_places import Place
from store_samples import Sample, file_of, flip, read, sample

from cachetune_rag.measuring.profiles import Profiles
from cachetune_store import ChunkStore, StoreArgumentError, StoreKeyError
from cachetune_store.errors import RemoteError

pytest.importorskip("cryptography")

KEY, OTHER = bytes(range(32)), bytes(range(1, 33))
TEXT = "The lighthouse was built in 1871 by three brothers."
NAME, TENANT = "confidential-report", "acme-the-tenant"
NOTE = "c" * 64


def encrypted(path: Path | None, **options: Any) -> ChunkStore:
    return ChunkStore(path, **{"store_key": KEY, "encrypt": True, "host_budget": 0} | options)


def fill(store: ChunkStore, *seeds: int, tenant: str = "", text: str = TEXT, document: str = NAME) -> None:
    for seed in seeds:
        sample(seed, tenant=tenant).put(store, text=text)
    store.set_document(document, [sample(seed, tenant=tenant).key for seed in seeds], tenant=tenant)


def chunk_file(path: Path) -> Path:
    (file,) = (path / "chunks").rglob("*.safetensors")
    return file


def test_chunks_documents_and_texts_come_back(tmp_path: Path) -> None:
    with encrypted(tmp_path) as store:
        fill(store, 1, 2)
    with ChunkStore(tmp_path, store_key=KEY, host_budget=0) as store:  # it says itself that it is encrypted
        assert read(store, sample(1))
        assert read(store, sample(2))
        assert [(info.id, info.stored) for info in store.documents()] == [(NAME, 2)]
        assert {text for _, text, _ in store.texts()} == {TEXT}
        assert {key for key, *_ in store.texts()} == set(store.text_keys()) == {sample(1).key, sample(2).key}
        assert store.verify().ok
        assert store.rebuild_index().ok
        assert read(store, sample(1))
        assert [info.id for info in store.documents()] == [NAME]
        assert store.delete_document(NAME)
        assert not list((tmp_path / "chunks").rglob("*.safetensors"))
        assert list(store.texts()) == []


@pytest.mark.parametrize("codec", ["exact", "int8", "fp8", "int4"])
def test_the_first_rows_of_any_layer_are_read_alone(tmp_path: Path, codec: str) -> None:
    """In any pieces, in each codec, as without encryption: nothing else of the file is needed to decrypt them."""
    one = sample(1, tokens=300)
    with encrypted(tmp_path / "kv", codec=codec) as store, ChunkStore(None, codec=codec) as plain:
        one.put(store)
        one.put(plain)
        with plain.open(one.key) as right:
            for pieces in ((1,), (64,), (65, 66, 150), (10, 300), (300,)):
                with store.open(one.key) as reader:
                    for layer in (2, 0):
                        before = []
                        for rows in pieces:
                            found = reader.read(layer, rows)
                            assert torch.equal(found, right.read(layer, rows))
                            before.append((found, rows))
                        # What was given out earlier isn't touched by later reads.
                        assert all(torch.equal(found, right.read(layer, rows)) for found, rows in before)
                    assert not reader.has(1, 1)


def test_encryption_takes_a_key(tmp_path: Path) -> None:
    with pytest.raises(StoreArgumentError, match="encrypt is True, and no store_key is given: give a key as well"):
        ChunkStore(tmp_path, encrypt=True)
    with pytest.raises(StoreArgumentError, match="encrypt is 'no'"):
        ChunkStore(tmp_path, store_key=KEY, encrypt="no")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_a_store_that_was_made_without_stays_so(tmp_path: Path) -> None:
    with ChunkStore(tmp_path / "keyed", store_key=KEY) as store:
        fill(store, 1)
    with pytest.raises(StoreKeyError, match=r"was made without encryption, which stays so: leave encrypt out"):
        encrypted(tmp_path / "keyed")
    with ChunkStore(tmp_path / "keyed", store_key=KEY) as store:
        assert read(store, sample(1))


def test_it_opens_with_its_key_only(tmp_path: Path) -> None:
    with encrypted(tmp_path) as store:
        fill(store, 1)
    with pytest.raises(StoreKeyError, match="was made with another key than store_key"):
        ChunkStore(tmp_path, store_key=OTHER)
    with pytest.raises(StoreKeyError, match="was made with a key, and none is given"):
        ChunkStore(tmp_path)
    with ChunkStore(tmp_path, store_key=KEY) as store:
        store.change_key(OTHER)
        assert read(store, sample(1))
    with ChunkStore(tmp_path, store_key=OTHER, host_budget=0) as store:
        assert read(store, sample(1))
        fill(store, 2)
    with pytest.raises(StoreKeyError, match="was made with another key"):
        ChunkStore(tmp_path, store_key=KEY)


def test_a_description_that_says_it_is_not_encrypted_opens_with_no_key(tmp_path: Path) -> None:
    """New files would be readable otherwise."""
    with encrypted(tmp_path) as store:
        fill(store, 1)
    file = tmp_path / "store.json"
    described = json.loads(file.read_text())
    assert described["version"] == 3, "earlier releases refuse it"
    for key in (described["key"], described["key"] | {"method": "hmac-sha256"}):
        file.write_text(json.dumps(described | {"version": 2, "key": key}))
        with pytest.raises(StoreKeyError):
            ChunkStore(tmp_path, store_key=KEY)
    file.write_text(json.dumps({**described, "version": 1, "key": None}))
    with pytest.raises(StoreKeyError):
        ChunkStore(tmp_path, store_key=KEY)


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "cachetune_store.encryption", raising=False)
    monkeypatch.setitem(sys.modules, "cryptography.exceptions", None)
    with pytest.raises(StoreArgumentError, match=r"pip install 'cachetune-rag\[encryption\]'"):
        encrypted(tmp_path)


# -- what is hidden ------------------------------------------------------------------------------------------------


def traces(one: Sample, text: str, tenant: str) -> list[bytes]:
    """What would give a chunk away: its text, its key, its tokens, its rows, and the names of tenant and document."""
    rows = [part.contiguous().numpy().tobytes()[:64] for pair in one.layers for part in pair]
    ids = torch.tensor(one.token_ids).numpy().tobytes()
    digests = [one.key.digest, one.namespace.digest]
    raw = [bytes.fromhex(each) for each in digests]
    names = [text[:20], tenant, NAME, one.namespace.model, one.namespace.tokenizer, *digests]
    return [*(each.encode() for each in names), ids[:40], json.dumps(one.token_ids)[:30].encode(), *rows, *raw]


def everything(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in folder.rglob("*"):
        yield str(path.relative_to(folder)), path.read_bytes() if path.is_file() else b""


def assert_hidden(contents: Iterator[tuple[str, bytes]], secrets: list[bytes]) -> None:
    count = 0
    for name, content in contents:
        count += len(content)
        for secret in secrets:
            assert secret not in name.encode(), f"{secret!r} in the name {name}"
            assert secret not in content, f"{secret!r} in {name}"
    assert count > 10_000


def leave_everything(store: ChunkStore, one: Sample) -> None:
    """What a store writes of a chunk, its document, notes and profiles; and what it keeps of damage."""
    one.put(store, text=TEXT)
    store.set_document(NAME, [one.key], tenant=TENANT)
    store.settle_note(NOTE, f"{TEXT} {NAME}".encode(), tenant=TENANT)
    if store.path is not None:
        Profiles(store.path, seal=store.seal).save("tuning", {"model": "model", "tenant": TENANT}, {"text": TEXT})


@pytest.mark.parametrize("way", ["encrypted", "plain"])
def test_nothing_of_texts_rows_and_names_is_in_the_folder(tmp_path: Path, way: str) -> None:
    one = sample(1, tenant=TENANT, model="some-model", tokenizer="some-tokenizer", lead_ins=((7, 8, 9),))
    two = sample(2, tenant=TENANT, model="some-model", tokenizer="some-tokenizer")
    store = encrypted(tmp_path) if way == "encrypted" else ChunkStore(tmp_path, host_budget=0)
    with store:
        leave_everything(store, one)
        two.put(store, text=TEXT)
        flip(max((tmp_path / "chunks").rglob("*.safetensors"), key=lambda path: path.stat().st_mtime), 9000)
        assert not store.verify().ok
        assert list((tmp_path / "damaged").iterdir())
        secrets = [*traces(one, TEXT, TENANT), *traces(two, TEXT, TENANT)]
        if way == "plain":  # the test finds what is there
            with pytest.raises(AssertionError):
                assert_hidden(everything(tmp_path), secrets)
            return
        assert_hidden(everything(tmp_path), secrets)
    assert_hidden(everything(tmp_path), secrets)
    with sqlite3.connect(tmp_path / "index" / "cache.db") as database:
        assert database.execute("SELECT COUNT(*) FROM Cache").fetchone()[0] > 5


def test_each_writing_of_a_chunk_has_a_key_of_its_own(tmp_path: Path) -> None:
    """So the same rows give other bytes, and no nonce comes twice under one key."""
    one, files, salts = sample(1), set(), set()
    for _ in range(3):
        with encrypted(tmp_path) as store:
            one.put(store)
            content = chunk_file(tmp_path).read_bytes()
            start = 8 + int.from_bytes(content[:8], "little")
            salts.add(json.loads(content[8:start])["__metadata__"]["salt"])
            files.add(content[start:])
            store.prune(lambda head: False)
    assert len(files) == len(salts) == 3


# -- what others change --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("encrypted") / "kv"
    with encrypted(path) as store:
        sample(1).put(store, text=TEXT)
    return path


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_changed_bit_anywhere_is_damage(stored: Path, data: st.DataObject) -> None:
    file = chunk_file(stored)
    kept = file.read_bytes()
    start = 8 + int.from_bytes(kept[:8], "little")
    tensors = {n: t for n, t in json.loads(kept[8:start]).items() if n != "__metadata__" and not n[4:].isdigit()}
    places = {"length": (0, 8), "header": (8, start)} | {
        name: tuple(start + at for at in tensor["data_offsets"]) for name, tensor in tensors.items()
    }
    begin, end = places[data.draw(st.sampled_from(sorted(places)))]
    flip(file, data.draw(st.integers(begin, end - 1)), data.draw(st.integers(0, 7)))
    with ChunkStore(stored, store_key=KEY, host_budget=0) as store:
        assert not read(store, sample(1))
        assert store.stats().damaged == 1
    file.write_bytes(kept)


@pytest.mark.parametrize("length", [0, 7, 4096, -4096, -1])
def test_a_shortened_chunk_is_damage(tmp_path: Path, length: int) -> None:
    with encrypted(tmp_path) as store:
        sample(1).put(store)
        file = chunk_file(tmp_path)
        file.write_bytes(file.read_bytes()[:length])
        assert not read(store, sample(1))
        assert store.stats().damaged == 1
        sample(1).put(store)
        assert read(store, sample(1))


def test_files_and_blocks_that_changed_places_are_damage(tmp_path: Path) -> None:
    with encrypted(tmp_path) as store:
        for seed in (1, 2):
            sample(seed).put(store)
        first, second = (store.tier("disk").path_of(sample(seed).key) for seed in (1, 2))
        ours, theirs = first.read_bytes(), second.read_bytes()
        name, other = first.stem.encode(), second.stem.encode()
        with store.open(sample(1).key) as reader:
            block = reader.head.plan.rows[0].size(64)
        start = len(ours) - reader.head.plan.total
        swapped = bytearray(ours)
        swapped[start : start + block], swapped[start + block : start + 2 * block] = (
            ours[start + block : start + 2 * block],
            ours[start : start + block],
        )
        spliced = ours[:start] + theirs[start : start + block] + ours[start + block :]
        for forged in (theirs, theirs.replace(other, name), bytes(swapped), spliced):
            first.write_bytes(forged)
            assert not read(store, sample(1))
            sample(1).put(store)
        first.write_bytes(ours)  # an older file of the same chunk is right
        assert read(store, sample(1))


def test_a_file_of_a_store_without_encryption_is_damage(tmp_path: Path) -> None:
    with ChunkStore(tmp_path / "keyed", store_key=KEY) as other, encrypted(tmp_path / "kv") as store:
        for each in (other, store):
            sample(1).put(each)
        chunk_file(tmp_path / "kv").write_bytes(file_of(tmp_path / "keyed", sample(1).key).read_bytes())
        assert not read(store, sample(1))
        assert store.stats().damaged == 1


def write_until_killed(path: str, started: Any) -> None:
    torch.set_num_threads(1)
    store = encrypted(Path(path))
    for seed in range(1000):
        sample(seed, tokens=600).put(store, text=TEXT)
        started.set()


def test_a_killed_writer_leaves_no_wrong_row(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")  # which has nothing to import
    started = context.Event()
    process = context.Process(target=write_until_killed, args=(str(tmp_path), started))
    process.start()
    started.wait(60)
    process.kill()
    process.join()
    assert_hidden(everything(tmp_path), [TEXT.encode()])
    with ChunkStore(tmp_path, store_key=KEY, host_budget=0) as store:
        report = store.verify()
        assert not report.damaged
        assert report.checked >= 1
        assert read(store, sample(0, tokens=600))


# -- a place that machines share -----------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", [None, "int4"])
def test_machines_share_an_encrypted_place(place: Place, tmp_path: Path, codec: str | None) -> None:
    one = sample(1, tenant=TENANT)
    first = place.store(tmp_path / "first", store_key=KEY, encrypt=True, remote_codec=codec)
    leave_everything(first, one)
    first.sync()
    secrets = traces(one, TEXT, TENANT)
    names = [name for folder in ("chunks/", "changes/", "notes/") for name in place.objects.names(folder)]
    assert len(names) >= 3
    objects = [(name, place.objects.get(name, 1 << 30) or b"") for name in [*names, "store.json"]]
    assert_hidden(iter(objects), secrets)
    second = place.store(tmp_path / "second", store_key=KEY, encrypt=True)
    third = place.store(store_key=KEY)
    for other in (second, third):
        assert [info.id for info in other.documents(tenant=TENANT)] == [NAME]
        assert [text for _, text, _ in other.texts()] == [TEXT]
        assert other.note(NOTE, tenant=TENANT) == f"{TEXT} {NAME}".encode()
        with other.open(one.key) as reader:
            assert reader.tier == "remote"
            assert one.matches(reader)
    assert second.verify().ok  # once its own copy of what was read is written
    second.close()
    assert_hidden(everything(tmp_path / "second"), secrets)
    with ChunkStore(tmp_path / "second", store_key=KEY) as alone:
        assert alone.verify().ok
        with alone.open(one.key) as reader:
            assert reader.tier == "disk"
            assert one.matches(reader)


def test_a_folder_and_its_place_are_both_encrypted_or_neither(folder: Place, tmp_path: Path) -> None:
    first = folder.store(store_key=KEY, encrypt=True)
    fill(first, 1)
    with pytest.raises(
        StoreKeyError, match=r"is encrypted, and the folder before it isn't.*give a folder that doesn't"
    ):
        folder.store(tmp_path / "readable", store_key=KEY, encrypt=False)
    second = folder.store(tmp_path / "as the place is", store_key=KEY)
    assert read(second, sample(1))
    assert json.loads((tmp_path / "as the place is" / "store.json").read_text())["version"] == 3
    other = Place(f"file://{tmp_path / 'other'}", {})
    other.store(store_key=KEY).close()
    with pytest.raises(StoreKeyError, match="was made without encryption"):
        other.store(tmp_path / "hidden", store_key=KEY, encrypt=True)


def test_a_place_that_cannot_be_asked_makes_no_folder_readable(network: Place, tmp_path: Path) -> None:
    assert network.proxy is not None
    network.proxy.fault = "refuse"
    with pytest.raises(RemoteError, match="it is not known whether the new folder before it has to be encrypted"):
        network.store(tmp_path / "kv", store_key=KEY)
    assert not (tmp_path / "kv").exists()
    network.store(tmp_path / "kv", store_key=KEY, encrypt=True)


def test_a_forged_object_is_deleted_and_counted(folder: Place) -> None:
    first = folder.store(store_key=KEY, encrypt=True)
    fill(first, 1)
    (name,) = folder.objects.names("chunks/")
    raw = bytearray(folder.objects.get(name, 1 << 30) or b"")
    raw[-4096 * 3] ^= 1
    folder.objects.put(name, [bytes(raw)])
    second = folder.store(store_key=KEY, host_budget=0)
    assert not read(second, sample(1))
    second.sync()
    assert second.stats().remote.damaged == 1
    assert not list(folder.objects.names("chunks/"))
