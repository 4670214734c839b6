"""Reading a chunk as a whole, and using one without a look-up, as measuring and reading ahead do."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from store_samples import file_of, flip, sample

from cachetune_store import ChunkStore, DamagedChunkError, StoreClosedError
from cachetune_store.tier_kinds import kind_of


@pytest.mark.parametrize("where", ["memory", "host", "disk", "device"])
def test_a_chunk_is_given_whole_and_stays_where_it_is(tmp_path: Path, where: str) -> None:
    path = None if where == "memory" else tmp_path
    options = {"device": "cpu", "device_budget": "1MiB"} if where == "device" else {}
    with ChunkStore(path, host_budget=0 if where == "disk" else "1MiB", **options) as store:
        one = sample()
        assert store.whole(one.key) is None
        one.put(store)
        if where == "device":
            with store.open(one.key) as reader:
                reader.promote()
        before = store.stats()
        chunk = store.whole(one.key)
        after = store.stats()
        assert (after.host.chunks, after.hits) == (before.host.chunks, before.hits)
        assert after.host.pinned == 0
        assert after.disk is None or after.disk.pinned == 0
    with ChunkStore(None) as other:
        other.write(chunk)
        with other.open(one.key) as reader:
            assert one.matches(reader)


def test_a_damaged_file_is_no_chunk(tmp_path: Path) -> None:
    with ChunkStore(tmp_path, host_budget=0) as store:
        sample().put(store)
        with store.open(sample().key) as reader:
            rows = reader.head.plan
        file = file_of(tmp_path, sample().key)
        flip(file, file.stat().st_size - rows.total + rows.offsets[-1])
        with pytest.raises(DamagedChunkError):
            store.whole(sample().key)
        store.discard(sample().key)
        assert store.whole(sample().key) is None
    with pytest.raises(StoreClosedError):
        store.whole(sample().key)


def test_a_use_in_memory_is_no_look_up_and_keeps_a_chunk_longest(tmp_path: Path) -> None:
    with ChunkStore(tmp_path) as store:
        sample(0).put(store)
        size = store.touch_host(sample(0).key)
    with ChunkStore(tmp_path, host_budget=2 * size) as store:
        assert store.host_budget == 2 * size
        assert store.touch_host(sample(0).key) == 0, "it is on disk"
        for seed in (0, 1):
            sample(seed).put(store)
            with store.open(sample(seed).key) as reader:
                reader.promote()
        before = store.stats().hits, store.stats().misses
        assert store.touch_host(sample(0).key) == size
        assert (store.stats().hits, store.stats().misses) == before
        sample(2).put(store)
        assert store.touch_host(sample(0).key) == size
        assert store.touch_host(sample(1).key) == 0


def test_what_cannot_come_up_is_not_read_for_it(tmp_path: Path) -> None:
    with ChunkStore(tmp_path, host_budget=0) as store:
        sample().put(store)
        with store.open(sample().key) as reader:
            reader.read(0, 1)
            read = reader.bytes_read
            assert not reader.promote()
            assert reader.bytes_read == read


@pytest.mark.parametrize("encrypt", [False, True])
def test_where_a_chunk_is_told_without_looking_at_any_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encrypt: bool
) -> None:
    """Of a chunk on disk, from the time when it was open; heads of encrypted files are not kept."""
    given = {"store_key": bytes(range(32)), "encrypt": True} if encrypt else {}
    one, other = sample(0), sample(1)
    with ChunkStore(tmp_path, **given) as store:
        one.put(store)
    with ChunkStore(tmp_path, **given) as store:
        assert store.foresee(one.key) is None
        with store.open(one.key) as reader:
            head, before = reader.head, (store.stats().hits, store.stats().misses)
        with monkeypatch.context() as patch:
            patch.setattr(os, "open", None)
            found = store.foresee(one.key)
        assert found == (None if encrypt else (kind_of("disk"), head))
        with store.open(one.key) as reader:
            reader.promote()
        kind, head = store.foresee(one.key)
        assert (kind.name, head.key) == ("host", one.key)
        assert store.foresee(other.key) is None
        assert (store.stats().hits, store.stats().misses) == (before[0] + 1, before[1])
        store.tier("host").remove(one.key)
        store.tier("disk").path_of(one.key).unlink()
        assert (store.foresee(one.key) is None) == encrypt  # nobody has looked
        assert store.open(one.key) is None
        assert store.foresee(one.key) is None


def test_a_chunk_that_made_room_or_was_replaced_is_not_foreseen_as_it_was(tmp_path: Path) -> None:
    one, other = sample(0), sample(1)
    with ChunkStore(tmp_path, host_budget=0) as store:
        one.put(store)
        size = store.size_of(one.key)
    with ChunkStore(tmp_path, host_budget=0, disk_budget=size + size // 2) as store:

        def foreseen() -> str | None:
            store.open(one.key).close()
            _, head = store.foresee(one.key)
            return head.text

        assert foreseen() is None
        one.put(store, text="With a text.")
        assert store.foresee(one.key) is None
        assert foreseen() == "With a text."
        other.put(store)
        assert not store.contains(one.key)
        assert store.foresee(one.key) is None
