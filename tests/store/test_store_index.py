"""If the index is lost, damaged or tampered with, it is made again from the files."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import sqlite3
import stat
import threading
from pathlib import Path

import pytest
from store_samples import file_of, flip, sample

from cachetune_store import Chunk, ChunkStore, IndexDamagedError, StorePathError, StoreVersionError, diskindex
from cachetune_store.diskindex import DiskIndex
from cachetune_store.errors import IndexReplacedError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A store with three chunks, two of them in a document."""
    path = tmp_path / "store"
    with ChunkStore(path) as store:
        for seed in range(3):
            sample(seed).put(store, text=f"text {seed}")
        store.set_document("doc", [sample(0).key, sample(1).key], tenant="t")
    return path


def check_whole(store: ChunkStore, chunks: int = 3) -> None:
    stats = store.stats()
    files = list((store.path / "chunks").glob("*/*"))
    assert stats.disk.chunks == chunks == len(files)
    assert stats.disk.bytes == sum(file.stat().st_size for file in files)
    assert stats.documents == 1
    assert sorted(text for _, text, _ in store.texts())[:chunks] == [f"text {seed}" for seed in range(chunks)]
    assert [info.id for info in store.documents(tenant="t")] == ["doc"]
    store.delete_document("doc", tenant="t")
    assert store.contains(sample(2).key)
    assert not store.contains(sample(0).key)


def delete_index(path: Path) -> None:
    shutil.rmtree(path / "index")


def delete_database(path: Path) -> None:
    (path / "index" / "cache.db").unlink()


def overwrite_database(path: Path) -> None:
    for file in (path / "index").iterdir():
        file.write_bytes(b"not a database" * 1000)


def damage_pages(path: Path) -> None:
    file = path / "index" / "cache.db"
    content = file.read_bytes()
    file.write_bytes(content[:4096] + bytes(len(content) - 4096))


def empty_database(path: Path) -> None:
    with sqlite3.connect(path / "index" / "cache.db") as db:
        db.execute("DROP TABLE Cache")


@pytest.mark.parametrize("harm", [delete_index, delete_database, overwrite_database, damage_pages, empty_database])
def test_a_lost_index_is_made_anew_on_open(path: Path, harm: object) -> None:
    harm(path)
    with ChunkStore(path) as store:
        check_whole(store)


def test_another_stores_index_is_not_used(path: Path) -> None:
    with ChunkStore(path.parent / "other") as other:
        sample(8).put(other, text="not here")
    shutil.rmtree(path / "index")
    shutil.copytree(path.parent / "other" / "index", path / "index")
    with ChunkStore(path) as store:
        check_whole(store)


def test_a_damaged_file_is_set_aside_though_the_index_is_damaged_too(path: Path) -> None:
    file = file_of(path, sample(0).key)
    with ChunkStore(path, host_budget=0) as store:
        flip(file, 5000)
        overwrite_database(path)
        assert store.open(sample(0).key) is None
        sample(0).put(store, text="text 0")
        assert store.stats().damaged == 1
        assert len(list((path / "damaged").iterdir())) == 1
        check_whole(store)


def test_a_rebuild_cut_short_is_done_again(path: Path) -> None:
    delete_index(path)
    index = DiskIndex(path / "index")
    with contextlib.suppress(RuntimeError), index.made_anew("id"):
        index.set("total", {"bytes": 1, "chunks": 1, "stored": 1})
        raise RuntimeError
    with pytest.raises(IndexDamagedError, match="not filled"):
        index.get("total")
    index.close()
    with ChunkStore(path) as store:
        check_whole(store)


def test_an_index_that_breaks_while_in_use_heals(path: Path) -> None:
    with ChunkStore(path) as store:
        overwrite_database(path)
        sample(0).put(store)
        with store.open(sample(1).key) as reader:
            assert sample(1).matches(reader)
        store.verify()
        check_whole(store)


def test_an_index_replaced_by_another_process_is_followed(path: Path) -> None:
    with ChunkStore(path) as one, ChunkStore(path) as two:
        two.rebuild_index()
        sample(5).put(one, text="text 5")
        assert "text 5" in [text for _, text, _ in two.texts()]
        assert two.stats().disk.chunks == 4


def test_an_index_deleted_while_in_use_is_made_anew(path: Path) -> None:
    with ChunkStore(path) as store:
        delete_index(path)
        sample(0).put(store)
        sample(3).put(store, text="text 3")
        check_whole(store, chunks=4)


def test_processes_heal_a_deleted_index_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    real = DiskIndex.clear
    monkeypatch.setattr(DiskIndex, "clear", lambda index: (made.append(1), real(index)))
    with ChunkStore(path) as one, ChunkStore(path) as two:
        delete_index(path)
        sample(5).put(one)
        sample(6).put(two)
        assert one.stats().disk.chunks == two.stats().disk.chunks == 5
    assert made == [1]


@pytest.mark.parametrize("name", ["meta/", "total", "chunk/", "text/", "doc/", "ref/"])
@pytest.mark.parametrize("place", [0, 30, -3])
def test_a_changed_character_of_a_record_is_noticed(path: Path, name: str, place: int) -> None:
    with sqlite3.connect(path / "index" / "cache.db") as db:
        for row, value in db.execute("SELECT rowid, value FROM Cache WHERE key LIKE ?", (f"{name}%",)).fetchall():
            at = place % len(value)
            changed = value[:at] + chr(ord(value[at]) ^ 1) + value[at + 1 :]
            db.execute("UPDATE Cache SET value = ? WHERE rowid = ?", (changed, row))
    with ChunkStore(path) as store:
        store.verify()
        check_whole(store)


@pytest.mark.parametrize("name", ["total", "meta/complete", "chunk/%", "text/%", "doc/%", "ref/%"])
@pytest.mark.parametrize("character", ["0", "z"])
def test_a_changed_character_of_a_name_is_noticed(path: Path, name: str, character: str) -> None:
    with sqlite3.connect(path / "index" / "cache.db") as db:
        (row, key) = db.execute("SELECT rowid, key FROM Cache WHERE key LIKE ?", (name,)).fetchone()
        db.execute("UPDATE Cache SET key = ? WHERE rowid = ?", (key[:-1] + character, row))
    with ChunkStore(path) as store:
        store.verify()
        check_whole(store)


def test_a_record_under_another_name_is_noticed(path: Path) -> None:
    with sqlite3.connect(path / "index" / "cache.db") as db:
        rows = db.execute("SELECT rowid, value FROM Cache WHERE key LIKE 'chunk/%'").fetchall()
        for (row, _), (_, value) in zip(rows, rows[1:] + rows[:1], strict=True):
            db.execute("UPDATE Cache SET value = ? WHERE rowid = ?", (value, row))
    with ChunkStore(path) as store:
        store.verify()
        check_whole(store)


def test_verify_enters_lost_texts(path: Path) -> None:
    with ChunkStore(path) as store:
        store.index.delete(f"text/{sample(0).key}")
        store.verify()
        check_whole(store)


def test_a_wrong_total_is_counted_anew(path: Path) -> None:
    with ChunkStore(path) as store:
        store.index.set("total", {"bytes": 1, "chunks": 99, "stored": 3})
        store.verify()
        check_whole(store)


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("name", ["meta/", "total", "chunk/", "text/", "doc/", "ref/"])
def test_a_planted_pickle_is_never_loaded(path: Path, name: str, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    with sqlite3.connect(path / "index" / "cache.db") as db:
        planted = db.execute(
            "UPDATE Cache SET mode = 4, value = ? WHERE key LIKE ?", (pickle.dumps(Bomb(marker)), f"{name}%")
        )
        assert planted.rowcount > 0
    with ChunkStore(path) as store:
        check_whole(store)
        sample(0).put(store)
        store.verify()
    assert not marker.exists()


def test_a_pickled_name_is_never_loaded(path: Path, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    with sqlite3.connect(path / "index" / "cache.db") as db:
        db.execute(
            "INSERT INTO Cache (key, raw, store_time, access_time, access_count, size, mode, value)"
            " VALUES (?, 0, 0, 0, 0, 0, 1, '1')",
            (sqlite3.Binary(pickle.dumps(Bomb(marker))),),
        )
    with ChunkStore(path) as store:
        check_whole(store)
    assert not marker.exists()


def new_index(folder: Path) -> DiskIndex:
    index = DiskIndex(folder / "index")
    with index.made_anew("id"):
        pass
    return index


def test_the_index_itself_refuses_pickles(tmp_path: Path) -> None:
    index = new_index(tmp_path)
    with pytest.raises(TypeError):
        index.set("object", object())
    with sqlite3.connect(tmp_path / "index" / "cache.db") as db:
        db.execute(
            "INSERT INTO Cache (key, raw, store_time, access_time, access_count, size, mode, value)"
            " VALUES ('p', 1, 0, 0, 0, 0, 4, ?)",
            (pickle.dumps([1]),),
        )
    with pytest.raises(IndexDamagedError, match="pickle"):
        index.get("p")
    index.close()


def test_a_failed_transaction_changes_nothing(tmp_path: Path) -> None:
    index = new_index(tmp_path)
    index.set("a", 1)

    def fail() -> None:
        with index.transaction():
            index.set("a", 2)
            with index.transaction():
                index.set("b", 2)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert (index.get("a"), index.get("b")) == (1, None)
    assert list(index.items("a")) == [("a", 1)]
    index.close()


def test_nothing_in_a_store_is_a_pickle(path: Path) -> None:
    for file in path.rglob("*"):
        assert file.suffix in {"", ".safetensors", ".json", ".db", ".lock", ".db-wal", ".db-shm"}
    with sqlite3.connect(path / "index" / "cache.db") as db:
        assert {mode for (mode,) in db.execute("SELECT DISTINCT mode FROM Cache")} == {1}
        settings = dict(db.execute("SELECT key, value FROM Settings"))
    assert settings["eviction_policy"] == "none"
    assert settings["cull_limit"] == 0


def test_verify_reads_everything_and_repairs(path: Path) -> None:
    stray = path / "tmp" / "0123.tmp"
    stray.write_bytes(b"half a chunk")
    flip(file_of(path, sample(0).key), file_of(path, sample(0).key).stat().st_size - 5000)
    file_of(path, sample(1).key).unlink()
    extra = sample(7)
    with ChunkStore(path.parent / "other") as other:
        extra.put(other, text="text 7")
    target = file_of(path, extra.key)
    target.parent.mkdir(exist_ok=True)
    shutil.copy(file_of(path.parent / "other", extra.key), target)
    with ChunkStore(path, host_budget=0) as store:
        report = store.verify()
        assert report.damaged == (sample(0).key,)
        assert not report.ok
        assert (report.checked, report.adopted, report.dropped, report.documents) == (2, 1, 1, 1)
        assert not stray.exists()
        assert json.dumps(report.as_dict())
        assert store.stats().disk.chunks == 2
        assert store.stats().disk.bytes == report.bytes
        # A document holds the two that are gone: their texts stay known, so that they are computed again when retrieved.
        assert sorted(text for _, text, _ in store.texts()) == ["text 0", "text 1", "text 2", "text 7"]
        assert store.verify().ok


def test_an_unknown_format_version_says_what_to_do(path: Path) -> None:
    (path / "store.json").write_text('{"format": "cachetune-store", "version": 99}')
    with pytest.raises(StoreVersionError, match=r"version 99.*reads version 1.*another directory"):
        ChunkStore(path)
    (path / "store.json").write_text("garbage")
    with pytest.raises(StoreVersionError, match="delete that file"):
        ChunkStore(path)
    (path / "store.json").unlink()
    with ChunkStore(path) as store:
        check_whole(store)


def test_directories_are_private(path: Path) -> None:
    for directory in [path, *(p for p in path.rglob("*") if p.is_dir())]:
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700, directory
    for file in path.rglob("*.safetensors"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_path_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for bad in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StorePathError, match=str(bad)):
            ChunkStore(bad)


def test_an_index_that_others_replace_again_and_again_is_followed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ChunkStore(path) as store:
        times, real = [], store.tier("disk").admit

        def admit(chunk: Chunk) -> list[Chunk]:
            if len(times) < 5:
                times.append(1)
                raise IndexReplacedError("another process mends the store")
            return real(chunk)

        monkeypatch.setattr(store.tier("disk"), "admit", admit)
        one = sample(5)
        one.put(store)
        assert len(times) == 5
        with store.open(one.key) as reader:  # type: ignore[union-attr]
            assert one.matches(reader)


def test_an_interrupted_transaction_keeps_nobody_out(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(index: DiskIndex) -> None:
        # As if Ctrl-C came inside of diskcache, behind its BEGIN and before it takes note of that.
        index.database._sql("BEGIN IMMEDIATE")
        raise KeyboardInterrupt

    with ChunkStore(path) as store, ChunkStore(path) as other:
        with monkeypatch.context() as patch:
            patch.setattr(DiskIndex, "begin", interrupted)
            with pytest.raises(KeyboardInterrupt):
                store.index.set("a", 1)
        other.index.set("b", 2)
        store.index.set("a", 3)
        assert (other.index.get("a"), store.index.get("b")) == (3, 2)
        check_whole(store)


def test_what_stands_before_a_name_is_not_walked(tmp_path: Path) -> None:
    """In the order of names, documents come after all chunks, of which there may be many."""
    index = new_index(tmp_path)
    with index.transaction():
        for number in range(3000):
            index.set(f"chunk/{number:064}", {"size": 1, "used": 0, "tokens": 1})
        index.set("doc/a/b", {"id": "", "tenant": "", "chunks": []})
    steps = 0

    def step() -> int:
        nonlocal steps
        steps += 1
        return 0

    with index.database.lent() as connection:
        connection.set_progress_handler(step, 10)
        assert list(index.names("doc/")) == ["doc/a/b"]
        assert index.count("doc/") == 1
        assert steps < 20, "SQLite's own instructions, in tens"
        assert index.count("chunk/") == len(list(index.names("chunk/"))) == 3000
        connection.set_progress_handler(None, 0)
    assert list(index.names("")) == [*index.names("chunk/"), "doc/a/b", "meta/complete"]
    index.close()


def test_counting_what_is_stored_reads_a_few_records(path: Path) -> None:
    with ChunkStore(path) as store:
        statements: list[str] = []
        with store.index.database.lent() as connection:
            connection.set_trace_callback(statements.append)
            store.stats()
            connection.set_trace_callback(None)
        assert len(statements) < 10


def test_no_thread_makes_a_database_while_the_old_one_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of it would be removed again, and the new index met a disk I/O error."""
    index = DiskIndex(tmp_path / "index")
    with index.made_anew("id"):
        index.set("name", 1)
    with index.database.lent():  # so that another thread needs a connection of its own
        pass
    real, said = diskindex.remove_any, []

    def read() -> None:
        try:
            with index.database.lent():
                said.append("lent")
        except IndexReplacedError as error:
            said.append(str(error))

    def remove(path: Path) -> None:
        real(path)
        thread = threading.Thread(target=read)
        thread.start()
        thread.join()

    monkeypatch.setattr(diskindex, "remove_any", remove)
    with index.made_anew("id"):
        index.set("name", 2)
    assert set(said) == {f"the index {tmp_path / 'index'} is being replaced"}
    assert index.get("name") == 2
    index.close()


def test_a_connection_to_an_index_that_is_being_made_anew_gives_no_records(tmp_path: Path) -> None:
    """A thread may need a first connection of its own just when another process has replaced the database."""
    index, other = DiskIndex(tmp_path / "index"), DiskIndex(tmp_path / "index")
    with index.made_anew("id"), index.transaction():
        for number in range(1000):
            index.set(f"name/{number:04}", number)
    names, errors = index.names("name/"), []
    assert next(names) == "name/0000"

    def read_on() -> None:
        try:
            list(names)
        except IndexReplacedError as error:
            errors.append(str(error))

    with index.database.lent(), other.made_anew("id"):
        thread = threading.Thread(target=read_on)
        thread.start()
        thread.join()
    assert "not filled yet" in errors[0]
    index.close()
    other.close()
