"""Waiting for locks of others is logged, ends at some time, and is avoided if it isn't necessary."""

from __future__ import annotations

import fcntl
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from store_samples import sample

from cachetune_store import ChunkStore, StoreLockedError, directory, locks

SPAWN = multiprocessing.get_context("spawn")
HOLD = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()"


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("_SOON", "_STOPPED", "_UNKNOWN"):
        monkeypatch.setattr(locks, name, 0.05)
    with ChunkStore(tmp_path) as store:
        sample(0).put(store, text="text")
    return tmp_path


@contextmanager
def stopped_holder(lock: Path) -> Iterator[int]:
    """A process that is stopped while it holds `lock`."""
    with subprocess.Popen([sys.executable, "-c", HOLD, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"held\n"
            process.send_signal(signal.SIGSTOP)
            os.waitpid(process.pid, os.WUNTRACED)
            yield process.pid
        finally:
            process.kill()


def test_a_sound_store_is_opened_and_used_though_a_stopped_process_has_its_lock(path: Path) -> None:
    with stopped_holder(path / "lock"), ChunkStore(path) as store:
        sample(1).put(store)
        store.set_document("d", [sample(1).key])
        assert [text for _, text, _ in store.texts()] == ["text"]


def test_a_stopped_holder_is_named_in_the_log_and_then_in_an_error(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (path / "index" / "cache.db").unlink()
    with stopped_holder(path / "lock") as pid, caplog.at_level(logging.WARNING):
        with pytest.raises(
            StoreLockedError, match=rf"{path}/lock .* process {pid} .*stopped: continue it \(kill -CONT {pid}\)"
        ):
            ChunkStore(path)
        assert f"process {pid}" in caplog.text
    ChunkStore(path).close()


@pytest.mark.parametrize("name", ["index.lock", "tmp/gate.lock"])
def test_no_lock_is_waited_for_without_end(path: Path, name: str) -> None:
    with ChunkStore(path) as store, stopped_holder(path / name), pytest.raises(StoreLockedError, match=name):
        sample(1).put(store)


def test_a_process_stopped_while_it_writes_the_index_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cachetune_store.database.BUSY_SECONDS", 0.05)
    begun = SPAWN.Event()
    process = SPAWN.Process(target=stop_inside_a_transaction, args=(str(path), begun))
    process.start()
    assert begun.wait(60)
    assert process.pid is not None
    os.waitpid(process.pid, os.WUNTRACED)
    try:
        with pytest.raises(StoreLockedError, match=f"cache.db.* process {process.pid} .*stopped"):
            ChunkStore(path)
    finally:
        process.kill()


def stop_inside_a_transaction(path: str, begun: Any) -> None:
    with ChunkStore(path) as store, store.index.transaction():
        begun.set()
        os.kill(os.getpid(), signal.SIGSTOP)


def test_a_lock_that_is_let_go_of_in_time_is_taken(tmp_path: Path) -> None:
    held, taken = threading.Event(), threading.Event()

    def hold() -> None:
        with locks.locked(tmp_path / "lock"):
            held.set()
            taken.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(60)
    with open(tmp_path / "lock", "a") as file, pytest.raises(BlockingIOError):  # noqa: PTH123
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    taken.set()
    with locks.locked(tmp_path / "lock"):
        thread.join()


def test_files_are_checked_without_the_lock(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = directory.check_files

    def check(*args: Any, **options: Any) -> Any:
        with (path / "lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return real(*args, **options)

    monkeypatch.setattr(directory, "check_files", check)
    with ChunkStore(path) as store:
        assert store.verify().ok


def test_an_index_whose_log_was_removed_while_in_use_is_made_anew(path: Path) -> None:
    for name in ("cache.db-wal", "cache.db-shm"):
        with ChunkStore(path) as one, ChunkStore(path) as two:
            sample(1).put(one)
            (path / "index" / name).unlink()
            sample(2).put(two)
            sample(3).put(one, text="text 3")
            assert one.stats().disk.chunks == two.stats().disk.chunks == 4  # type: ignore[union-attr]
            assert "text 3" in [text for _, text, _ in two.texts()]
        with ChunkStore(path) as store:
            report = store.verify()
            assert (report.adopted, report.dropped, report.damaged) == (0, 0, ())
            store.prune(lambda head: head.key == sample(0).key)


def test_an_index_is_not_opened_while_another_process_replaces_it(path: Path) -> None:
    with stopped_holder(path / "index.lock"), pytest.raises(StoreLockedError, match=r"index\.lock .*stopped"):
        ChunkStore(path)


def test_a_store_is_opened_and_changed_while_its_index_is_made_anew(tmp_path: Path) -> None:
    failed: list[Exception] = []

    def change() -> None:
        try:
            for seed in range(1, 9):
                with ChunkStore(tmp_path) as store:
                    sample(seed, tokens=20).put(store, text=f"text {seed}")
                    store.set_document(f"d{seed}", [sample(seed, tokens=20).key])
        except Exception as error:
            failed.append(error)

    with ChunkStore(tmp_path) as store:
        thread = threading.Thread(target=change)
        thread.start()
        for _ in range(4):
            store.rebuild_index()
        thread.join()
        assert failed == []
        assert len(store.documents()) == 8
        report = store.verify()
        assert (report.checked, report.adopted, report.dropped, report.damaged) == (8, 0, 0, ())
