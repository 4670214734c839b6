"""With killed writers, full disks and several processes, at most the chunk that is being written is lost, and no row is ever wrong."""

from __future__ import annotations

import errno
import multiprocessing
import os
import sqlite3
import time
from pathlib import Path

import pytest
from store_samples import die_after, die_while_writing, file_of, sample, use_at_random, write_until_killed

from cachetune_store import ChunkStore, StoreFullError, StorePathError, directory
from cachetune_store.diskindex import DiskIndex
from cachetune_store.files import TempFiles

SPAWN = multiprocessing.get_context("spawn")


def test_a_killed_writer_leaves_a_sound_store(tmp_path: Path) -> None:
    ChunkStore(tmp_path).close()
    for moment, codec in ((0.0, "exact"), (0.03, "int4")):
        started = SPAWN.Event()
        process = SPAWN.Process(target=write_until_killed, args=(str(tmp_path), codec, started))
        process.start()
        assert started.wait(60)
        time.sleep(moment)
        process.kill()
        process.join()
    with ChunkStore(tmp_path, host_budget=0) as store:
        assert list((tmp_path / "tmp").glob("*.tmp")) == []
        assert store.verify().ok
        first = sample(0, tokens=600)
        with store.open(first.key) as reader:
            assert first.matches(reader)
        files = list((tmp_path / "chunks").glob("*/*"))
        assert store.stats().disk.chunks == len(files) > 0
        assert store.stats().disk.bytes == sum(file.stat().st_size for file in files)


def test_what_a_killed_writer_left_is_cleaned_up(tmp_path: Path) -> None:
    ChunkStore(tmp_path).close()
    process = SPAWN.Process(target=die_while_writing, args=(str(tmp_path),))
    process.start()
    process.join()
    assert process.exitcode == -9
    assert len(list((tmp_path / "tmp").glob("*.tmp"))) == 1
    with ChunkStore(tmp_path) as store:
        assert list((tmp_path / "tmp").glob("*.tmp")) == []
        assert not store.contains(sample(1).key)
        sample(1).put(store)


@pytest.mark.parametrize(("call", "action"), [("replace", "put"), ("unlink", "put"), ("unlink", "document")])
def test_names_changed_by_a_killed_writer_are_in_the_index_after_opening(
    tmp_path: Path, call: str, action: str
) -> None:
    with ChunkStore(tmp_path) as store:
        for seed in range(2):
            sample(seed).put(store, text=f"text {seed}")
        store.set_document("d", [sample(0).key])
    process = SPAWN.Process(target=die_after, args=(str(tmp_path), call, action))
    process.start()
    process.join()
    assert process.exitcode == -9
    with ChunkStore(tmp_path) as store:
        files = {file.stem: file.stat().st_size for file in (tmp_path / "chunks").glob("*/*")}
        stats = store.stats().disk
        assert (stats.chunks, stats.bytes) == (len(files), sum(files.values()))
        assert store.contains(sample(9).key) == (call == "replace")
        report = store.verify()
        assert (report.damaged, report.adopted, report.dropped) == ((), 0, 0)
    assert list((tmp_path / "tmp").glob("*.mark")) == []


def test_files_and_index_are_compared_after_a_crash_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[int] = []
    monkeypatch.setattr(directory, "compare_files", lambda *_: compared.append(1))
    with ChunkStore(tmp_path) as store:
        sample(0).put(store)
        with ChunkStore(tmp_path):
            pass
    with ChunkStore(tmp_path) as store:
        store.open(sample(0).key).close()
    assert compared == []
    (tmp_path / "tmp" / "dead.mark").touch()
    for _ in range(2):
        ChunkStore(tmp_path).close()
    assert compared == [1]


def test_a_chunk_whose_entry_cannot_be_committed_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = DiskIndex.begin

    def begin(index: DiskIndex) -> object:
        transact = real(index)
        leave = transact.__exit__

        def fail(*error: object) -> object:
            if error[0] is None and file_of(tmp_path, sample(1).key).exists():
                full = sqlite3.OperationalError("database or disk is full")
                leave(type(full), full, None)
                raise full
            return leave(*error)

        transact.__exit__ = fail
        return transact

    with ChunkStore(tmp_path, host_budget=0) as store:
        sample(0).put(store)
        with monkeypatch.context() as patch:
            patch.setattr(DiskIndex, "begin", begin)
            with pytest.raises(StoreFullError):
                sample(1).put(store)
        assert not store.contains(sample(1).key)
        assert store.stats().disk.chunks == 1
        sample(1).put(store)
        assert store.stats().disk.chunks == 2


def test_the_file_of_a_living_writer_is_left_alone(tmp_path: Path) -> None:
    store = ChunkStore(tmp_path)
    seen: list[int] = []

    def publish(written: Path) -> None:
        os.utime(written, (0, 0))
        with ChunkStore(tmp_path) as other:
            other.verify()
        seen.append(written.stat().st_size)

    TempFiles(tmp_path / "tmp").write([b"being written"], publish)
    assert seen == [13]
    store.close()


@pytest.mark.parametrize("call", ["write", "fsync", "open"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES])
def test_a_disk_that_refuses_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    with ChunkStore(tmp_path) as store:
        sample(0).put(store)
        real = getattr(os, call)

        def refuse(*args: object, **kwargs: object) -> object:
            if call == "open" and not str(args[0]).endswith(".tmp"):
                return real(*args, **kwargs)
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch:
            patch.setattr(os, call, refuse)
            with pytest.raises(StorePathError, match=str(tmp_path)) as caught:
                sample(1).put(store)
        assert isinstance(caught.value, StoreFullError) == (number != errno.EACCES)
        assert not store.contains(sample(1).key)
        assert list((tmp_path / "tmp").glob("*.tmp")) == []
        with store.open(sample(0).key) as reader:
            assert sample(0).matches(reader)
        assert store.verify().checked == 1
        assert store.stats().disk.chunks == 1
        sample(1).put(store)


def test_a_temporary_file_that_cannot_be_deleted_goes_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with ChunkStore(tmp_path) as store:
        descriptors = len(list(Path("/proc/self/fd").iterdir()))
        with monkeypatch.context() as patch:
            patch.setattr("cachetune_store.files.write_all", refuse)
            patch.setattr(os, "unlink", refuse)
            with pytest.raises(StorePathError, match="Read-only"):
                sample(0).put(store)
        assert len(list((tmp_path / "tmp").glob("*.tmp"))) == 1
        assert store.verify().temp_files == 1
        assert list((tmp_path / "tmp").glob("*.tmp")) == []
        assert len(list(Path("/proc/self/fd").iterdir())) <= descriptors + 4, "but for the index and the mark"


def test_a_file_gone_between_any_two_steps_is_a_miss(tmp_path: Path) -> None:
    with ChunkStore(tmp_path, host_budget=0) as store:
        sample().put(store)
        assert store.contains(sample().key)
        file_of(tmp_path, sample().key).unlink()
        assert store.open(sample().key) is None
        assert not store.contains(sample().key)
        assert store.stats().damaged == 0
        sample().put(store)
        with store.open(sample().key) as reader:
            file_of(tmp_path, sample().key).unlink()
            assert sample().matches(reader)


def test_processes_share_a_store(tmp_path: Path) -> None:
    results = SPAWN.Queue()
    budget = 250_000  # about four of the eight chunks
    processes = [
        SPAWN.Process(target=use_at_random, args=(str(tmp_path), codec, seed, 120, budget, results))
        for seed, codec in enumerate(("exact", "int4"))
    ]
    for process in processes:
        process.start()
    found = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert [wrong for _, wrong in found] == [[], []]
    assert sum(hits for hits, _ in found) > 0
    with ChunkStore(tmp_path, disk_budget=budget) as store:
        report = store.verify()
        assert report.ok
        assert (report.adopted, report.dropped, report.temp_files) == (0, 0, 0)
        assert report.bytes == store.stats().disk.bytes <= budget


def test_stores_of_one_process_share_a_directory(tmp_path: Path) -> None:
    with ChunkStore(tmp_path) as one, ChunkStore(tmp_path) as two:
        sample().put(one)
        assert two.contains(sample().key)
        two.set_document("d", [sample().key])
        assert one.documents()[0].id == "d"
        with two.open(sample().key) as reader:
            one.delete_document("d")
            assert sample().matches(reader)
        assert not two.contains(sample().key)
