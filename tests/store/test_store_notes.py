"""Notes: records on which all users of a store agree."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from cachetune_store import ChunkStore, StorePathError

NAME, OTHER = "a" * 64, "b" * 64
SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture(params=["disk", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    with ChunkStore(tmp_path if request.param == "disk" else None) as made:
        yield made


def test_the_first_writer_wins(store: ChunkStore) -> None:
    assert store.note(NAME) is None
    assert store.settle_note(NAME, b"first") == b"first"
    assert store.settle_note(NAME, b"second") == b"first"
    assert store.note(NAME) == b"first"
    assert store.note(OTHER) is None


def test_a_damaged_one_makes_room_for_another(store: ChunkStore) -> None:
    store.settle_note(NAME, b"broken")
    assert not store.discard_note(NAME, b"something else")  # another process has repaired it meanwhile
    assert store.note(NAME) == b"broken"
    assert store.discard_note(NAME, b"broken")
    assert not store.discard_note(NAME, b"broken")
    assert store.note(NAME) is None
    assert store.settle_note(NAME, b"new") == b"new"


def test_tenants_have_their_own_and_take_them_along(store: ChunkStore) -> None:
    for tenant in ("", "a", "../../b"):
        assert store.settle_note(NAME, tenant.encode() + b"!", tenant=tenant) == tenant.encode() + b"!"
    store.settle_note(OTHER, b"broken", tenant="a")
    store.discard_note(OTHER, b"broken", tenant="a")
    store.delete_tenant("a")
    assert store.note(NAME, tenant="a") is None
    assert store.note(NAME) == b"!"
    assert store.note(NAME, tenant="../../b") == b"../../b!"
    if store.path is not None:
        assert len([path for path in (store.path / "notes").glob("*/*") if path.is_file()]) == 2
    assert store.settle_note(NAME, b"anew", tenant="a") == b"anew"


def test_names_and_sizes_are_bounded(store: ChunkStore) -> None:
    for name in ("", "../" + "a" * 61, "A" * 64, "a" * 63):
        with pytest.raises(ValueError, match="64 lower-case hex"):
            store.settle_note(name, b"x")
        with pytest.raises(ValueError, match="64 lower-case hex"):
            store.note(name)
    with pytest.raises(ValueError, match="1048576"):
        store.settle_note(NAME, b"x" * ((1 << 20) + 1))


def test_it_outlives_the_index_and_every_check(tmp_path: Path) -> None:
    with ChunkStore(tmp_path) as store:
        store.settle_note(NAME, b"content")
    shutil.rmtree(tmp_path / "index")
    with ChunkStore(tmp_path) as store:
        assert store.note(NAME) == b"content"
        assert store.verify().ok
        store.rebuild_index()
        assert store.note(NAME) == b"content"
    assert not list((tmp_path / "tmp").glob("*.tmp"))


def test_a_file_that_is_too_long_is_cut(tmp_path: Path) -> None:
    with ChunkStore(tmp_path) as store:
        store.settle_note(NAME, b"content")
        next((tmp_path / "notes").glob(f"*/{NAME}.json")).write_bytes(b"x" * (3 << 20))
        assert len(store.note(NAME) or b"") == (1 << 20) + 1


def test_where_there_are_no_links_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", link)
    with ChunkStore(tmp_path) as store:
        assert store.settle_note(NAME, b"first") == b"first"
        assert store.settle_note(NAME, b"second") == b"first"


def test_a_directory_that_refuses_is_named(tmp_path: Path) -> None:
    with ChunkStore(tmp_path) as store:
        (tmp_path / "notes").write_bytes(b"a file is in the way")
        with pytest.raises(StorePathError, match="Not a directory"):
            store.settle_note(NAME, b"x")


def settle(path: str, barrier: Any, results: Any, content: bytes) -> None:
    with ChunkStore(path) as store:
        barrier.wait(60)
        results.put(store.settle_note(NAME, content))


def test_processes_that_race_agree(tmp_path: Path) -> None:
    ChunkStore(tmp_path).close()
    barrier, results = SPAWN.Barrier(3), SPAWN.Queue()
    processes = [SPAWN.Process(target=settle, args=(str(tmp_path), barrier, results, bytes([i]))) for i in range(3)]
    for process in processes:
        process.start()
    found = {results.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
    assert len(found) == 1
    with ChunkStore(tmp_path) as store:
        assert store.note(NAME) in found
