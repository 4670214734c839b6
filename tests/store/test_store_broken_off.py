"""A change that fails at any of its steps is told, loses nothing else, and is finished by the next run."""

from __future__ import annotations

import logging
import sqlite3
from pathlib import Path

import pytest
from broken_off import CHANGES, OPENINGS, SAMPLES, failed_at_every_step, fill, killed_at_every_step
from faulty_disk import Fault, faulty_disk
from store_samples import file_of

from cachetune_store import ChunkStore, StorePathError
from cachetune_store.connections import Connections


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("broken")


@pytest.mark.parametrize(
    ("name", "kind", "every", "first"),
    [
        ("remove", "EIO", 3, 1),
        ("replace", "ENOSPC", 9, 4),
        ("prune", "EROFS", 9, 8),
        ("set aside", "EIO", 19, 18),
        ("verify", "EACCES", 31, 2),
        ("rebuild", "EMFILE", 37, 45),
        ("store", "EIO", 9, 2),
    ],
)
def test_a_change_that_fails_at_a_step_is_finished_by_the_next(
    folder: Path, name: str, kind: str, every: int, first: int
) -> None:
    assert list(failed_at_every_step(folder, CHANGES[name], kind, every=every, first=first)) == []


@pytest.mark.parametrize(
    ("name", "bystander", "every", "first"),
    [
        ("remove", False, 37, 90),
        ("prune", True, 37, 127),
        ("add to a document", True, 41, 60),
        ("rebuild", True, 80, 177),
        ("compare after a crash", False, 97, 50),
    ],
)
def test_a_process_killed_at_a_step_loses_and_leaves_nothing(
    folder: Path, name: str, bystander: bool, every: int, first: int
) -> None:
    change = {**CHANGES, **OPENINGS}[name]
    assert list(killed_at_every_step(folder, change, bystander=bystander, every=every, first=first)) == []


def test_an_index_whose_making_failed_is_not_taken_for_a_whole_one(tmp_path: Path) -> None:
    fill(tmp_path)
    with ChunkStore(tmp_path) as store:
        with (
            faulty_disk(tmp_path / "documents", Fault("EIO", ("scandir",))),
            pytest.raises(StorePathError, match="check the disk"),
        ):
            store.rebuild_index()
        with faulty_disk(tmp_path / "documents", Fault("EIO", ("scandir",))), pytest.raises(StorePathError):
            store.documents()
        assert [info.id for info in store.documents()] == ["A", "B"]
        assert len(list(store.texts())) == 4


@pytest.mark.parametrize("folder", ["documents", "chunks"])
def test_files_that_could_not_be_read_while_the_index_was_made_are_found_later(
    tmp_path: Path, folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path)
    for file in (tmp_path / "index").iterdir():
        file.unlink()
    with faulty_disk(tmp_path / folder, Fault("ENOMEM", ("open",))), caplog.at_level(logging.WARNING):
        ChunkStore(tmp_path).close()
    assert "when the store is next opened" in caplog.text
    with ChunkStore(tmp_path) as store:
        assert [info.id for info in store.documents()] == ["A", "B"]
        assert len(list(store.texts())) == 4
        assert store.verify().adopted == 0
    assert list((tmp_path / "tmp").glob("*.mark")) == []


def test_a_chunk_whose_file_cannot_be_looked_at_is_not_missing(tmp_path: Path) -> None:
    fill(tmp_path)
    with ChunkStore(tmp_path) as store:
        with faulty_disk(tmp_path / "chunks", Fault("EIO", ("open", "lstat"))):
            report = store.verify()
        assert (report.dropped, len(report.unreadable)) == (0, 4)
        assert store.verify().ok


def test_a_chunk_that_cannot_be_looked_at_while_the_index_is_made_stays_in_it(tmp_path: Path) -> None:
    fill(tmp_path)
    with ChunkStore(tmp_path) as store:
        with faulty_disk(tmp_path / "chunks", Fault("EIO", ("stat", "lstat"))):
            store.rebuild_index()
        assert all(store.open(one.key) for one in SAMPLES)
        assert len(list(store.texts())) == 4
        assert store.verify().adopted == 0


def test_an_index_that_could_not_be_looked_at_when_it_was_opened_counts_as_another_one(tmp_path: Path) -> None:
    """So it is opened again. It was taken for one that has lost its log, which is an error."""
    file = tmp_path / "cache.db"
    connections = Connections(file, lambda path: sqlite3.connect(path, isolation_level=None))
    with connections.lent() as connection:
        connection.execute("PRAGMA journal_mode=wal")
        connection.execute("CREATE TABLE t (x)")
        connections.note()
        assert not connections.is_replaced()
        with faulty_disk(tmp_path, Fault("EIO", ("stat",))):
            connections.note()
            assert not connections.is_replaced()
        assert not connections.has_lost_its_log()
        assert connections.is_replaced()
    connections.close()


def test_damage_that_cannot_be_set_aside_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(tmp_path)
    CHANGES["set aside"].before(tmp_path)
    with ChunkStore(tmp_path, host_budget=0) as store:
        with faulty_disk(tmp_path / "damaged", Fault("EROFS", ("mkdir",))), caplog.at_level(logging.WARNING):
            assert store.verify().damaged == (SAMPLES[1].key,)
        assert f"{file_of(tmp_path, SAMPLES[1].key)} is damaged, and setting it aside failed" in caplog.text
        assert store.verify().damaged == (SAMPLES[1].key,)
        assert not file_of(tmp_path, SAMPLES[1].key).exists()
        assert store.verify().ok
