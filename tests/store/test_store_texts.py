"""Texts of stored chunks: an evicted chunk is still recognised and stored again, and a removed document's text is gone."""

from __future__ import annotations

from pathlib import Path

import pytest
from store_samples import sample

from cachetune_store import ChunkStore


def known(store: ChunkStore) -> list[str]:
    return sorted(text for _, text, _ in store.texts())


def small_store(path: Path | None) -> ChunkStore:
    """Room for two chunks of `sample`."""
    with ChunkStore(None) as probe:
        size = sample(0).put(probe)
    room = size * 5 // 2
    return ChunkStore(path, host_budget=0 if path else room, disk_budget=room * 2 if path else 0)


@pytest.mark.parametrize("where", ["disk", "memory"])
def test_an_evicted_chunk_of_a_document_stays_known(tmp_path: Path, where: str) -> None:
    with small_store(tmp_path / "kv" if where == "disk" else None) as store:
        sample(0).put(store, text="held")
        store.set_document("doc", [sample(0).key])
        sample(1).put(store, text="loose")
        seed = 2
        while store.contains(sample(0).key) or store.contains(sample(1).key):
            sample(seed).put(store, text=f"text {seed}")
            seed += 1
        assert "held" in known(store)
        assert "loose" not in known(store)
        # Computed again, it is stored again; deleted, it is gone.
        sample(0).put(store, text="held")
        assert store.contains(sample(0).key)
        store.delete_document("doc")
        assert "held" not in known(store)


def test_texts_in_memory_are_those_of_the_chunks_that_are_there_now(tmp_path: Path) -> None:
    with ChunkStore(tmp_path / "kv", host_budget="1GiB") as store:
        sample(0).put(store, text="one")
        sample(1).put(store, text="two")
        sample(2).put(store)  # without a text
        assert sorted(store.texts_in_memory()) == ["one", "two"]
    with ChunkStore(tmp_path / "kv", host_budget="1GiB") as store:
        assert store.texts_in_memory() == []
    with small_store(None) as store:
        for seed in range(4):
            sample(seed).put(store, text=f"text {seed}")
        assert store.texts_in_memory() == ["text 2", "text 3"]


def test_deleting_a_document_forgets_texts_of_chunks_that_were_evicted(tmp_path: Path) -> None:
    with small_store(tmp_path / "kv") as store:
        sample(0).put(store, text="held")
        store.set_document("doc", [sample(0).key])
        seed = 1
        while store.contains(sample(0).key):
            sample(seed).put(store)
            seed += 1
        assert known(store) == ["held"]
        store.delete_document("doc")
        assert known(store) == []


def test_the_revision_changes_with_the_texts_of_any_process(tmp_path: Path) -> None:
    with ChunkStore(tmp_path) as one, ChunkStore(tmp_path) as other:
        start = one.revision()
        sample(0).put(other, text="a")
        added = one.revision()
        assert added != start
        sample(0).put(other, text="a")
        sample(1).put(other)
        assert one.revision() == added
        other.set_document("doc", [sample(0).key])
        other.delete_document("doc")
        assert one.revision() != added
