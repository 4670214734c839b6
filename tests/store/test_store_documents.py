"""Documents hold chunks, and chunks that no document holds are deleted. Tenants see nothing of each other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from store_samples import file_of, flip, sample

from cachetune_store import ChunkStore, StoreArgumentError, UnknownDocumentError


@pytest.fixture(params=["disk", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ChunkStore:
    with ChunkStore(tmp_path / "store" if request.param == "disk" else None) as opened:
        for seed in range(4):
            sample(seed).put(opened, text=f"text {seed}")
        yield opened


KEYS = [sample(seed).key for seed in range(4)]


def held(store: ChunkStore) -> list[int]:
    return [seed for seed in range(4) if store.contains(KEYS[seed])]


def test_deleting_a_document_frees_what_no_other_holds(store: ChunkStore) -> None:
    store.set_document("a", KEYS[:2])
    store.set_document("b", KEYS[1:3])
    size = store.documents()[0].bytes // 2
    assert store.delete_document("a") == size > 0
    assert held(store) == [1, 2, 3], "chunk 3 belongs to no document and is not touched"
    assert store.delete_document("b") == 2 * size
    assert held(store) == [3]
    assert [text for _, text, _ in store.texts()] == ["text 3"]
    assert store.documents() == []


def test_replacing_a_document_frees_what_it_no_longer_holds(store: ChunkStore) -> None:
    store.set_document("a", KEYS[:3])
    store.set_document("a", [KEYS[2], KEYS[3], KEYS[2]])
    assert held(store) == [2, 3]
    store.set_document("a", [KEYS[2], KEYS[3], KEYS[2]])
    assert held(store) == [2, 3]
    (info,) = store.documents()
    assert info.chunks == (KEYS[2], KEYS[3], KEYS[2])
    assert info.stored == 2
    store.set_document("a", [])
    assert held(store) == []
    assert store.documents()[0].chunks == ()


def test_unknown_documents_are_named(store: ChunkStore) -> None:
    with pytest.raises(UnknownDocumentError, match="'nope'"):
        store.delete_document("nope")
    store.set_document("a", KEYS[:1])
    with pytest.raises(UnknownDocumentError, match="'other'"):
        store.delete_document("a", tenant="other")
    assert held(store) == [0, 1, 2, 3]


def test_documents_of_tenants_are_apart(store: ChunkStore) -> None:
    store.set_document("a", KEYS[:1])
    store.set_document("a", KEYS[1:2], tenant="acme")
    assert [info.chunks for info in store.documents()] == [(KEYS[0],)]
    assert [(info.chunks, info.tenant) for info in store.documents(tenant="acme")] == [((KEYS[1],), "acme")]
    assert store.documents(tenant="ac") == []
    store.delete_document("a", tenant="acme")
    assert held(store) == [0, 2, 3]


def test_a_chunk_of_one_tenant_is_not_anothers(store: ChunkStore) -> None:
    mine, theirs = sample(9, tenant="me"), sample(9, tenant="them")
    mine.put(store, text="secret")
    assert mine.token_ids == theirs.token_ids
    assert not store.contains(theirs.key)
    assert store.open(theirs.key) is None
    assert [text for _, text, _ in store.texts(namespace=theirs.namespace)] == []
    assert [text for _, text, _ in store.texts(namespace=mine.namespace)] == ["secret"]
    assert len(list(store.texts())) == 5


def test_a_document_id_may_be_any_string(store: ChunkStore) -> None:
    names = ["", "../../etc/passwd", "/abs", "a/b", ".", "a" * 5000, "ü", "\ud800", "\0", "doc/x"]
    for name in names:
        store.set_document(name, KEYS[:1], tenant="../..")
    assert [info.id for info in store.documents(tenant="../..")] == sorted(names)
    if store.path is not None:
        outside = {p.name for p in store.path.parent.iterdir()}
        assert outside == {"store"}
    for name in names[1:]:
        assert store.delete_document(name, tenant="../..") == 0
    assert store.delete_document("", tenant="../..") > 0


def test_a_document_may_name_chunks_that_are_not_there(store: ChunkStore) -> None:
    absent = sample(77).key
    store.set_document("a", [absent, KEYS[0]])
    assert store.documents()[0].stored == 1
    store.delete_document("a")
    assert held(store) == [1, 2, 3]


def test_an_open_chunk_outlives_its_deletion(store: ChunkStore) -> None:
    store.set_document("a", KEYS[:1])
    with store.open(KEYS[0]) as reader:
        store.delete_document("a")
        assert not store.contains(KEYS[0])
        assert sample(0).matches(reader)
    assert not store.contains(KEYS[0])


def test_texts_are_given_with_their_tokens(store: ChunkStore) -> None:
    assert {text: (key, tokens) for key, text, tokens in store.texts()} == {
        f"text {seed}": (KEYS[seed], 150) for seed in range(4)
    }


def test_texts_of_some_chunks(store: ChunkStore) -> None:
    assert sorted(map(str, store.text_keys())) == sorted(map(str, KEYS[:4]))
    wanted = [KEYS[2], sample(77).key, KEYS[0]]
    assert [text for _, text, _ in store.texts(keys=wanted)] == ["text 2", "text 0"]
    assert list(store.texts(keys=wanted, namespace=sample(0, tenant="another").namespace)) == []
    assert list(store.texts(keys=[])) == []
    with pytest.raises(StoreArgumentError, match="chunk key"):
        store.texts(keys=["text"])  # type: ignore[list-item]


@pytest.mark.parametrize("text", ["ünï \0 \ud800 日本", "x" * 100_000])
def test_a_text_may_be_any_string(store: ChunkStore, text: str) -> None:
    sample(9).put(store, text=text)
    assert text in [found for _, found, _ in store.texts()]
    with store.open(sample(9).key) as reader:
        assert reader.text == text


def test_a_text_is_added_to_a_chunk_stored_without(store: ChunkStore) -> None:
    sample(9).put(store)
    sample(9).put(store, text="late")
    sample(9).put(store)
    assert "late" in [text for _, text, _ in store.texts()]
    with store.open(sample(9).key) as reader:
        assert reader.text == "late"
        assert sample(9).matches(reader)


def test_a_chunk_being_read_is_not_promoted_after_its_deletion(tmp_path: Path) -> None:
    with ChunkStore(tmp_path) as store:
        sample().put(store)
    with ChunkStore(tmp_path) as store:
        store.set_document("a", [sample().key])
        with store.open(sample().key) as reader:
            assert sample().matches(reader)
            store.delete_document("a")
        assert not store.contains(sample().key)
        assert store.stats().host.bytes == 0


def test_deleting_takes_what_was_set_aside_along(tmp_path: Path) -> None:
    with ChunkStore(tmp_path) as store:
        sample().put(store, text="personal")
        store.set_document("a", [sample().key])
        flip(file_of(tmp_path, sample().key), 99)
        store.discard(sample().key)
        sample().put(store, text="personal")
        store.delete_document("a")
        assert list(tmp_path.rglob("*.safetensors")) == []


@pytest.mark.parametrize("index", ["kept", "lost"])
@pytest.mark.parametrize("what", ["id", "chunk", "cut"])
def test_a_damaged_document_file_is_noticed(tmp_path: Path, index: str, what: str) -> None:
    with ChunkStore(tmp_path) as store:
        sample(0).put(store)
        store.set_document("doc", KEYS[:1], tenant="t")
        store.set_document("other", KEYS[:1])
    (file,) = (f for f in (tmp_path / "documents").glob("*/*.json") if b'"doc"' in f.read_bytes())
    content = file.read_bytes()
    harm = {
        "id": content.replace(b'"doc"', b'"dob"'),
        "chunk": content.replace(KEYS[0].digest.encode(), KEYS[0].digest[::-1].encode()),
        "cut": content[:-5],
    }
    file.write_bytes(harm[what])
    if index == "lost":
        shutil.rmtree(tmp_path / "index")
    with ChunkStore(tmp_path) as store:
        store.verify()
        kept = [(info.id, info.chunks) for info in store.documents(tenant="t")]
        assert kept == ([("doc", (KEYS[0],))] if index == "kept" else [])
        store.rebuild_index()
        assert [(info.id, info.chunks) for info in store.documents(tenant="t")] == kept
        assert [info.id for info in store.documents()] == ["other"]


def test_a_document_file_of_the_first_release_is_read(tmp_path: Path) -> None:
    with ChunkStore(tmp_path) as store:
        store.set_document("doc", KEYS[:1])
    (file,) = (tmp_path / "documents").glob("*/*.json")
    record = json.loads(file.read_bytes())
    del record["checksum"]
    file.write_text(json.dumps(record))
    shutil.rmtree(tmp_path / "index")
    with ChunkStore(tmp_path) as store:
        assert store.documents()[0].chunks == (KEYS[0],)


def test_a_document_that_comes_in_parts_keeps_them_all(store: ChunkStore) -> None:
    store.extend_document("a", KEYS[:2])
    store.extend_document("a", [KEYS[1], KEYS[2], KEYS[2]])
    store.extend_document("a", KEYS[:3])
    assert [info.chunks for info in store.documents()] == [tuple(KEYS[:3])]
    store.extend_document("b", [])
    assert [(info.id, info.chunks) for info in store.documents()] == [("a", tuple(KEYS[:3])), ("b", ())]
    store.extend_document("a", KEYS[3:], tenant="other")
    store.set_document("c", KEYS[2:3])
    store.delete_document("a")
    assert held(store) == [2, 3], "chunk 2 is held by c, chunk 3 by another tenant's document"


def test_an_extended_document_is_in_its_file(tmp_path: Path) -> None:
    with ChunkStore(tmp_path) as store:
        store.set_document("a", [KEYS[0], KEYS[0]])
        store.extend_document("a", KEYS[:2])
    shutil.rmtree(tmp_path / "index")
    with ChunkStore(tmp_path) as store:
        assert store.documents()[0].chunks == (KEYS[0], KEYS[0], KEYS[1])


def test_of_many_documents_a_few_that_lie_evenly_among_all_are_given() -> None:
    keys = [sample(number).key for number in range(2)]
    with ChunkStore(None) as store:
        for number in range(20):
            store.set_document(f"d{number}", [keys[0]] * (number + 1), tenant="a")
        store.set_document("d", keys, tenant="b")
        every = store.sample_documents(20, tenant="a")
        assert sorted(map(len, every)) == list(range(1, 21))
        for most in (1, 3, 19):
            some = store.sample_documents(most, tenant="a")
            assert most / 2 <= len(some) <= most
            step = every.index(some[1]) if len(some) > 1 else 20
            assert some == every[::step]
        assert store.sample_documents(5, tenant="b") == [tuple(keys)]
        assert store.sample_documents(5) == []
