"""A store with a key: whatever was not written with the same key, in the same place, is damage, and is never used."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import pickle
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from store_samples import Sample, file_of, flip, read, sample

from cachetune_rag.options import EngineOptions
from cachetune_store import ChunkStore, StoreArgumentError, StoreKeyError, StoreVersionError
from cachetune_store.chunk import as_written
from cachetune_store.chunkfile import encode_head
from cachetune_store.keyed_hashes import KeyedHashes
from cachetune_store.seals import CHECKSUMS
from cachetune_store.storekey import StoreKey, hkdf

KEY, OTHER = bytes(range(32)), bytes(range(1, 33))
NOTE = "a" * 64


def keyed(path: Path, key: bytes | None = KEY) -> ChunkStore:
    return ChunkStore(path, store_key=key, host_budget=0)


def fill(path: Path, *seeds: int, key: bytes | None = KEY, tenant: str = "") -> None:
    with keyed(path, key) as store:
        for seed in seeds:
            sample(seed, tenant=tenant).put(store, text=f"text {seed}")
        store.set_document("d", [sample(seed, tenant=tenant).key for seed in seeds], tenant=tenant)


def assert_damage(path: Path, one: Sample) -> None:
    """The chunk is damage: it is set aside, counted, and may be stored again."""
    with keyed(path) as store:
        assert not read(store, one)
        assert store.stats().damaged == 1
        assert not file_of(path, one.key).exists()
        one.put(store)
        assert read(store, one)


def test_chunks_of_a_store_with_a_key_come_back(tmp_path: Path) -> None:
    fill(tmp_path, 1, 2)
    with keyed(tmp_path) as store:
        assert read(store, sample(1))
        assert store.verify().ok
        assert [info.id for info in store.documents()] == ["d"]


def test_the_key_may_be_in_a_file_or_in_an_environment_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "kv", 1, key=KEY.hex().encode())
    file = tmp_path / "key"
    file.write_text(f"{KEY.hex()}\n")
    monkeypatch.setenv("SOME_KEY", KEY.hex())
    for given_key in (file, str(file), "env:SOME_KEY"):
        with ChunkStore(tmp_path / "kv", store_key=given_key) as store:
            assert store.contains(sample(1).key)
    fill(tmp_path / "raw", 1)
    file.write_bytes(KEY)  # not a text: taken as it is
    with ChunkStore(tmp_path / "raw", store_key=file) as store:
        assert store.contains(sample(1).key)


@pytest.mark.parametrize(
    ("key", "said"),
    [
        (b"short", "store_key has 5 bytes; a store's key has 32 to 4096"),
        (b"", "store_key has 0 bytes"),
        ("", "store_key is of type str; use bytes"),
        (7, "store_key is of type int; use bytes"),
        ("env:NO_SUCH_VARIABLE", "there is no such environment variable; set it"),
        ("/no/such/file", r"'/no/such/file', a file that can't be read \(No such file or directory\)"),
    ],
)
def test_what_is_no_key_is_refused(tmp_path: Path, key: object, said: str) -> None:
    with pytest.raises(StoreArgumentError, match=said):
        ChunkStore(tmp_path, store_key=key)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_a_store_in_memory_takes_no_key() -> None:
    with pytest.raises(StoreArgumentError, match="a store in memory only, where there is nothing to protect"):
        ChunkStore(None, store_key=KEY)


def test_a_store_with_a_key_opens_with_that_key_only(tmp_path: Path) -> None:
    fill(tmp_path, 1)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(StoreKeyError, match="was made with a key, and none is given: give it as store_key"):
        keyed(tmp_path, None)
    with pytest.raises(StoreKeyError, match="was made with another key than store_key"):
        keyed(tmp_path, OTHER)
    assert sorted(tmp_path.rglob("*")) == before, "nothing was set aside"
    with keyed(tmp_path) as store:
        assert read(store, sample(1))


def test_a_store_without_a_key_takes_none(tmp_path: Path) -> None:
    fill(tmp_path, 1, key=None)
    with pytest.raises(StoreKeyError, match=r"was made without a key.*leave store_key out, or make a store with a key"):
        keyed(tmp_path)
    assert "key" not in json.loads((tmp_path / "store.json").read_text())


def test_earlier_releases_refuse_a_store_with_a_key(tmp_path: Path) -> None:
    fill(tmp_path, 1)
    assert json.loads((tmp_path / "store.json").read_text())["version"] == 2


def test_a_description_that_was_changed_opens_with_no_key(tmp_path: Path) -> None:
    fill(tmp_path, 1)
    file = tmp_path / "store.json"
    described = json.loads(file.read_text())
    for name, value in described["key"].items():
        changed = described["key"] | {name: "0" + value[1:] if value[0] != "0" else "1" + value[1:]}
        file.write_text(json.dumps(described | {"key": changed}))
        with pytest.raises(StoreKeyError):
            keyed(tmp_path)
    for downgraded in (described | {"version": 1}, {**described, "key": None}):
        file.write_text(json.dumps(downgraded))
        with pytest.raises(StoreVersionError):
            keyed(tmp_path)
    file.unlink()
    with pytest.raises(StoreKeyError, match=r"store.json is gone, and what a store wrote is there.*Put the file back"):
        keyed(tmp_path)


@pytest.mark.parametrize("kept", ["chunks", "documents", "notes"])
def test_what_is_left_without_a_description_opens_with_no_key(tmp_path: Path, kept: str) -> None:
    fill(tmp_path, 1)
    with keyed(tmp_path) as store:
        store.settle_note(NOTE, b"ours")
    for part in {"chunks", "documents", "notes"} - {kept}:
        shutil.rmtree(tmp_path / part)
    (tmp_path / "store.json").unlink()
    with pytest.raises(StoreKeyError, match="Put the file back"):
        keyed(tmp_path)


# -- chunks -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("key") / "kv"
    fill(path, 1, 2)
    return path


def regions(path: Path, one: Sample) -> dict[str, tuple[int, int]]:
    """Where each tensor of a chunk file lies, and the header."""
    content = file_of(path, one.key).read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    del header["__metadata__"]
    found = {name: tuple(start + at for at in tensor["data_offsets"]) for name, tensor in header.items()}
    return {"length": (0, 8), "header": (8, start), **found}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_changed_bit_anywhere_is_damage(stored: Path, data: st.DataObject) -> None:
    one = sample(1)
    file, kept = file_of(stored, one.key), file_of(stored, one.key).read_bytes()
    places = {name: where for name, where in regions(stored, one).items() if not name.startswith("pad.")}
    begin, end = places[data.draw(st.sampled_from(sorted(places)))]
    flip(file, data.draw(st.integers(begin, end - 1)), data.draw(st.integers(0, 7)))
    with keyed(stored) as store:
        assert not read(store, one)
        assert store.stats().damaged == 1
    file.write_bytes(kept)


def forged(path: Path, one: Sample, key: bytes | None) -> bytes:
    """A well-formed file of a chunk with other numbers, by someone who lacks the key."""
    other = dataclasses.replace(one, layers=[(k + 1, v) for k, v in one.layers])
    fill_with = ChunkStore(path, store_key=key)
    with fill_with as store:
        other.put(store)
    return file_of(path, one.key).read_bytes()


@pytest.mark.parametrize("key", [None, OTHER, KEY], ids=["no key", "another key", "another store of the same key"])
def test_a_forged_chunk_is_damage(tmp_path: Path, key: bytes | None) -> None:
    one = sample(1)
    fill(tmp_path / "kv", 1)
    file_of(tmp_path / "kv", one.key).write_bytes(forged(tmp_path / "forger", one, key))
    assert_damage(tmp_path / "kv", one)


def test_without_a_key_a_forged_chunk_is_used(tmp_path: Path) -> None:
    """What the key is for."""
    one = sample(1)
    fill(tmp_path / "kv", 1, key=None)
    file_of(tmp_path / "kv", one.key).write_bytes(forged(tmp_path / "forger", one, None))
    with keyed(tmp_path / "kv", None) as store, store.open(one.key) as reader:
        assert not one.matches(reader)


@pytest.mark.parametrize("renamed", [False, True], ids=["as it is", "renamed inside"])
def test_chunks_that_changed_places_are_damage(tmp_path: Path, renamed: bool) -> None:
    fill(tmp_path, 1, 2)
    one, two = file_of(tmp_path, sample(1).key), file_of(tmp_path, sample(2).key)
    first, second = one.read_bytes(), two.read_bytes()
    names = sample(1).key.digest.encode(), sample(2).key.digest.encode()
    two.write_bytes(first.replace(*names) if renamed else first)
    one.write_bytes(second.replace(*reversed(names)) if renamed else second)
    assert_damage(tmp_path, sample(1))
    assert_damage(tmp_path, sample(2))


@pytest.mark.parametrize("sums_too", [False, True])
@pytest.mark.parametrize("across", ["layers", "blocks", "chunks"])
def test_rows_that_changed_places_are_damage(tmp_path: Path, across: str, sums_too: bool) -> None:
    """With their sums, or without."""
    fill(tmp_path, 1, 2)
    one = sample(1)
    with keyed(tmp_path) as store, store.open(one.key) as reader:
        form = reader.head.plan.rows[0].size(64)
    where = regions(tmp_path, one)
    rows, sums = {name: where[name][0] for name in ("layer.0", "layer.1")}, where["checksums"][0]
    blocks = 3
    to, sum_to = {"layers": (rows["layer.1"], sums + 16 * blocks), "blocks": (rows["layer.0"] + form, sums + 16)}.get(
        across, (rows["layer.0"], sums)
    )
    source = bytearray(file_of(tmp_path, (sample(2) if across == "chunks" else one).key).read_bytes())
    target = bytearray(file_of(tmp_path, one.key).read_bytes())
    target[to : to + form] = source[rows["layer.0"] : rows["layer.0"] + form]
    if sums_too:
        target[sum_to : sum_to + 16] = source[sums : sums + 16]
    file_of(tmp_path, one.key).write_bytes(target)
    assert_damage(tmp_path, one)


def test_a_sum_is_of_one_place_only() -> None:
    """Even for someone who could put a sum where the head has another."""
    seal, rows = KeyedHashes(KEY), memoryview(bytes(1000))
    one, two = sample(1).key, sample(2).key
    sums = {seal.rows(*place, rows) for place in ((one, 0, 0), (two, 0, 0), (one, 1, 0), (one, 0, 1))}
    sums |= {seal.rows(one, 0, 0, rows[:-1]), KeyedHashes(OTHER).rows(one, 0, 0, rows)}
    assert len(sums) == 6
    records = {seal.record(kind, name, content) for kind in "ab" for name in ("", "x") for content in (b"", b"x")}
    assert len(records) == 8
    assert not seal.matches(two, 0, 0, rows, seal.rows(one, 0, 0, rows))


def test_a_tenants_chunk_given_to_another_is_damage(tmp_path: Path) -> None:
    ours, theirs = sample(1, tenant="a"), sample(1, tenant="b")
    fill(tmp_path, 1, tenant="a")
    fill(tmp_path, 1, tenant="b")
    given_away = file_of(tmp_path, ours.key).read_bytes()
    for content in (given_away, given_away.replace(ours.key.digest.encode(), theirs.key.digest.encode())):
        file_of(tmp_path, theirs.key).write_bytes(content)
        assert_damage(tmp_path, theirs)


@pytest.mark.parametrize("length", [0, 7, 4096, -4096, -1])
def test_a_shortened_chunk_is_damage(tmp_path: Path, length: int) -> None:
    fill(tmp_path, 1)
    file = file_of(tmp_path, sample(1).key)
    file.write_bytes(file.read_bytes()[:length])
    assert_damage(tmp_path, sample(1))


def test_verify_finds_what_was_forged(tmp_path: Path) -> None:
    fill(tmp_path / "kv", 1, 2)
    file_of(tmp_path / "kv", sample(1).key).write_bytes(forged(tmp_path / "forger", sample(1), None))
    with keyed(tmp_path / "kv") as store:
        report = store.verify()
    assert report.damaged == (sample(1).key,)


def test_an_older_file_of_the_same_chunk_is_not_told_from_the_newer_one(tmp_path: Path) -> None:
    """The store wrote it for these tokens of this tenant, so its rows are right. SECURITY.md says so."""
    fill(tmp_path, 1)
    older = file_of(tmp_path, sample(1).key).read_bytes()
    with keyed(tmp_path) as store:
        store.delete_document("d")
    fill(tmp_path, 1)
    file_of(tmp_path, sample(1).key).write_bytes(older)
    with keyed(tmp_path) as store:
        assert read(store, sample(1))


# -- documents, notes, index --------------------------------------------------------------------------------------


def test_a_forged_document_is_not_known(tmp_path: Path) -> None:
    fill(tmp_path, 1, 2)
    (file,) = (tmp_path / "documents").rglob("*.json")
    record = json.loads(file.read_text())
    record["chunks"] = record["chunks"][:1]
    text = json.dumps([record["id"], record["tenant"], record["chunks"]])
    for checksum in ({"checksum": xxhash.xxh3_64_hexdigest(text.encode())}, {}):
        file.write_text(json.dumps({**{k: v for k, v in record.items() if k != "checksum"}, **checksum}))
        shutil.rmtree(tmp_path / "index")
        with keyed(tmp_path) as store:
            assert store.documents() == []


def forge_note(raw: bytes) -> bytes:
    return raw.replace(b"ours", b"evil")


@pytest.mark.parametrize("change", [forge_note, lambda raw: raw[-4:], lambda raw: raw[:-1], lambda raw: b""])
def test_a_forged_note_is_damaged(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    with keyed(tmp_path) as store:
        assert store.settle_note(NOTE, b"ours", tenant="t") == b"ours"
        (file,) = (tmp_path / "notes").rglob("*.json")
        file.write_bytes(change(file.read_bytes()))
        assert store.note(NOTE, tenant="t") == b""
        assert store.discard_note(NOTE, b"", tenant="t")
        assert store.settle_note(NOTE, b"anew", tenant="t") == b"anew"


def test_a_note_of_another_tenant_or_name_is_damaged(tmp_path: Path) -> None:
    with keyed(tmp_path) as store:
        store.settle_note(NOTE, b"ours", tenant="t")
        (file,) = (tmp_path / "notes").rglob("*.json")
        store.settle_note(NOTE, b"theirs", tenant="u")
        store.settle_note("b" * 64, b"other", tenant="t")
        theirs = next(each for each in (tmp_path / "notes").rglob("*.json") if each.parent != file.parent)
        theirs.write_bytes(file.read_bytes())
        file.with_name(f"{'b' * 64}.json").write_bytes(file.read_bytes())
        assert store.note(NOTE, tenant="u") == store.note("b" * 64, tenant="t") == b""
        assert store.note(NOTE, tenant="t") == b"ours"


@pytest.mark.parametrize("forger", ["checksum", "another record"])
def test_a_forged_record_of_the_index_is_not_used(tmp_path: Path, forger: str) -> None:
    fill(tmp_path, 1, 2)
    names = [f"text/{sample(seed).key}" for seed in (1, 2)]
    with sqlite3.connect(tmp_path / "index" / "cache.db") as database:
        values = [database.execute("SELECT value FROM Cache WHERE key = ?", (n,)).fetchone()[0] for n in names]
        text = values[0][32:].replace("text 1", "evil 1")
        value = xxhash.xxh3_64_hexdigest(text.encode()) + text if forger == "checksum" else values[1]
        database.execute("UPDATE Cache SET value = ? WHERE key = ?", (value, names[0]))
    database.close()
    with keyed(tmp_path) as store:
        assert {text for _, text, _ in store.texts()} == {"text 1", "text 2"}, "the index was made anew from the files"


# -- another key --------------------------------------------------------------------------------------------------


def test_a_store_can_be_given_another_key(tmp_path: Path) -> None:
    fill(tmp_path, 1)
    files = {path: path.read_bytes() for path in (tmp_path / "chunks").rglob("*.safetensors")}
    with keyed(tmp_path) as store:
        store.change_key(OTHER)
        store.change_key(OTHER)  # nothing is left to do
        sample(2).put(store)
        assert read(store, sample(1)), "what is open stays usable"
    with pytest.raises(StoreKeyError, match="another key"):
        keyed(tmp_path)
    with keyed(tmp_path, OTHER) as store:
        assert read(store, sample(1))
        assert read(store, sample(2))
    assert {path: path.read_bytes() for path in files} == files


def test_a_store_without_a_key_is_given_none(tmp_path: Path) -> None:
    with keyed(tmp_path, None) as store, pytest.raises(StoreKeyError, match="made without a key"):
        store.change_key(KEY)
    with keyed(tmp_path / "kv") as store, pytest.raises(StoreArgumentError, match="new_key is None"):
        store.change_key(None)


def use(path: Path, key: bytes, go: object, results: object) -> None:
    torch.set_num_threads(1)
    with keyed(path, key) as store:
        sample(1).put(store)
        results.put("open")  # type: ignore[attr-defined]
        go.wait(60)  # type: ignore[attr-defined]
        sample(3).put(store)
        results.put(read(store, sample(2)))  # type: ignore[attr-defined]


def test_two_processes_share_a_store_with_a_key_also_while_it_changes(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    go, results = context.Event(), context.Queue()
    process = context.Process(target=use, args=(tmp_path, KEY, go, results))
    process.start()
    try:
        assert results.get(timeout=60) == "open"
        with keyed(tmp_path) as store:
            assert read(store, sample(1))
            sample(2).put(store)
            store.change_key(OTHER)
        go.set()
        assert results.get(timeout=60) is True
    finally:
        go.set()
        process.join(60)
    with keyed(tmp_path, OTHER) as store:
        assert read(store, sample(3))
        assert store.stats().damaged == 0


def test_a_store_with_a_key_is_read_where_it_can_not_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, 1)
    monkeypatch.setattr("cachetune_store.directory._refusal", lambda path: PermissionError(13, "refused", str(path)))
    with keyed(tmp_path) as store:
        assert store.read_only
        assert read(store, sample(1))
        assert [text for _, text, _ in store.texts()] == ["text 1"]
    with pytest.raises(StoreKeyError, match="none is given"):
        keyed(tmp_path, None)


def test_sums_of_another_store_are_made_anew_over_the_same_rows(tmp_path: Path) -> None:
    fill(tmp_path, 1)
    with keyed(tmp_path) as store:
        chunk = store.whole(sample(1).key)
        assert chunk is not None
        head, slab, deviations = as_written(chunk, CHECKSUMS)
        assert slab is chunk.slab
        assert not deviations
    with ChunkStore(tmp_path / "plain") as store:
        sample(1).put(store, text="text 1")
    content = file_of(tmp_path / "plain", sample(1).key).read_bytes()
    assert content.startswith(encode_head(head))
    assert len(content) == file_of(tmp_path, sample(1).key).stat().st_size


def test_no_key_is_shown() -> None:
    shown = f"{StoreKey(KEY)} {KeyedHashes(KEY)} {EngineOptions(store_key=KEY)}"
    assert KEY.hex() not in shown
    assert repr(KEY) not in shown


def test_keys_are_derived_as_rfc_5869_says() -> None:
    """Its first test case."""
    derived = hkdf(bytes([0x0B] * 22), salt=bytes(range(13)), info=bytes(range(0xF0, 0xFA)), length=42)
    assert derived.hex() == ("3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865")


def test_a_key_that_is_given_as_a_text_is_not_shown(tmp_path: Path) -> None:
    for text in (KEY.hex(), "q3" * 22 + "="):
        with pytest.raises(StoreArgumentError, match="names no file, and looks like a key: give the path") as refused:
            ChunkStore(tmp_path, store_key=text)
        assert text not in str(refused.value)


def test_a_key_given_as_bytes_is_that_of_the_file_with_these_bytes(tmp_path: Path) -> None:
    (tmp_path / "key").write_text(f"{KEY.hex()}\n")
    fill(tmp_path / "kv", 1, key=(tmp_path / "key").read_bytes())
    with ChunkStore(tmp_path / "kv", store_key=tmp_path / "key") as store:
        assert read(store, sample(1))


def test_a_description_with_an_odd_id_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, 1)
    described = json.loads((tmp_path / "store.json").read_text())
    (tmp_path / "store.json").write_text(json.dumps(described | {"id": "\ud800"}))
    with pytest.raises(StoreKeyError):
        keyed(tmp_path)


def test_a_key_can_be_handed_to_another_process_unseen() -> None:
    """As an option of actors on a cluster, which shows what they are given."""
    given_key = EngineOptions(store_key=StoreKey.given(KEY))
    sent = pickle.loads(pickle.dumps(given_key))
    assert StoreKey.given(sent.store_key).wrap(KEY, "id").keys()
    assert StoreKey.given(sent.store_key).unwrap(StoreKey(KEY).wrap(OTHER, "id"), "id", "here") == OTHER
    shown = f"{dataclasses.asdict(given_key)} {list(map(str, dataclasses.astuple(given_key)))}"
    assert "StoreKey(...)" in shown
    assert not any(secret in shown for secret in (KEY.hex(), repr(KEY), str(list(KEY))))
