"""A store that is open at a fork is refused in the child at once, stays whole in the parent, and can be opened again in both."""

from __future__ import annotations

import gc
import os
import queue
import signal
import sqlite3
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from store_samples import sample

from cachetune_store import ChunkStore, StoreForkedError, connections
from cachetune_store.connections import Connections
from cachetune_store.diskindex import DiskIndex
from cachetune_store.errors import IndexReplacedError

KEY = sample(0).key


def in_child(work: Callable[[], None]) -> None:
    """Run `work` in a forked process. If it fails or takes 30 seconds, this raises an error."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(30)
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.fixture(params=["disk", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ChunkStore:
    with ChunkStore(tmp_path / "store" if request.param == "disk" else None) as opened:
        sample(0).put(opened, text="text")
        opened.set_document("d", [KEY])
        yield opened


def test_every_use_is_refused_in_the_child(store: ChunkStore) -> None:
    def use() -> None:
        for action in (
            lambda: store.open(KEY),
            lambda: store.contains(KEY),
            lambda: sample(1).put(store),
            lambda: store.set_document("e", [KEY]),
            lambda: store.claim([KEY]),
            lambda: list(store.texts()),
            store.documents,
            store.stats,
            store.verify,
        ):
            with pytest.raises(StoreForkedError, match=r"post_fork.*spawn"):
                action()

    in_child(use)
    assert [info.id for info in store.documents()] == ["d"]


def test_the_child_releases_nothing_of_the_parents(store: ChunkStore) -> None:
    reader = store.open(KEY)
    claim = store.claim([KEY])

    def leave() -> None:
        nonlocal reader, claim
        claim.close()
        reader.close()  # type: ignore[union-attr]
        store.close()
        store.close()
        reader = claim = None  # type: ignore[assignment]
        gc.collect()

    in_child(leave)
    with store.claim([KEY]) as other:
        assert other.keys == frozenset()
    assert sample(0).matches(reader)  # type: ignore[arg-type]
    reader.close()  # type: ignore[union-attr]
    claim.close()
    sample(2).put(store)
    assert store.verify().ok


def test_the_child_waits_for_no_thread_that_is_not_there(store: ChunkStore) -> None:
    """Locks that other threads hold at the moment of the fork stay locked in the child."""
    reader, claim = store.open(KEY), store.claim([KEY])
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        # Only who holds all of the locks shows that the child takes none of them.
        with store._placement._lock, store.memory._lock, store.tier("host")._lock, store.index.transaction():  # noqa: SLF001
            inside.set()
            leave.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    assert inside.wait(60)

    def close() -> None:
        reader.close()  # type: ignore[union-attr]
        claim.close()
        store.close()

    previous, connections.FORK_SECONDS = connections.FORK_SECONDS, 0.1
    try:
        in_child(close)
    finally:
        connections.FORK_SECONDS = previous
        leave.set()
        thread.join()
    sample(3).put(store)
    assert store.verify().ok
    reader.close()  # type: ignore[union-attr]
    claim.close()


def _in_the_same_place(file: Path, content: bytes) -> None:
    """Let a file have another's content and keep its inode number, as a new file may that takes the place of one that nobody has open."""
    for beside in ("-wal", "-shm"):
        file.with_name(file.name + beside).unlink(missing_ok=True)
    file.write_bytes(content)


def _unfilled(folder: Path) -> bytes:
    """An index whose making was cut short."""
    index = DiskIndex(folder)
    index.close()
    return (folder / "cache.db").read_bytes()


@pytest.mark.parametrize("made", [True, False])
def test_an_index_that_was_replaced_during_a_fork_is_not_taken_for_the_one_before(
    tmp_path: Path, made: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody has the database open during a fork, so another one may get its inode number. It was thought to be whole, and chunks were missing."""
    content = _unfilled(tmp_path / "other") if made else b""
    file = tmp_path / "store" / "index" / "cache.db"
    with ChunkStore(tmp_path / "store") as store:
        sample(0).put(store, text="text")
        store.set_document("d", [KEY])
        before = file.stat().st_ino
        in_child(lambda: _in_the_same_place(file, content))
        assert file.stat().st_ino == before
        assert [info.id for info in store.documents()] == ["d"]
        assert store.contains(KEY)
        assert [text for _, text, _ in store.texts()] == ["text"]
        assert store.verify().adopted == 0
    assert caplog.text == ""


def test_names_are_not_cut_short_by_a_fork_during_which_the_index_was_replaced(tmp_path: Path) -> None:
    content = _unfilled(tmp_path / "other")
    index = DiskIndex(tmp_path / "index")
    with index.made_anew("id"), index.transaction():
        for number in range(1000):
            index.set(f"name/{number:04}", number)
    names = index.names("name/")
    assert next(names) == "name/0000"
    in_child(lambda: _in_the_same_place(tmp_path / "index" / "cache.db", content))
    with pytest.raises(IndexReplacedError):
        list(names)
    index.close()


def test_parent_and_child_each_open_the_folder(tmp_path: Path) -> None:
    with ChunkStore(tmp_path) as store:
        sample(0).put(store)

        def work() -> None:
            with ChunkStore(tmp_path) as own:
                sample(1).put(own, text="from the child")
                own.set_document("child", [sample(1).key])

        for _ in range(2):
            in_child(work)
            sample(2).put(store)
        assert [info.id for info in store.documents()] == ["child"]
        assert store.verify().ok
        assert store.stats().disk.chunks == 3  # type: ignore[union-attr]


def test_a_child_keeps_no_lock_of_the_parents(tmp_path: Path) -> None:
    """If the child outlives the parent, the parent's claims are free, and its mark is not that of a writer that died."""
    ready, done = os.pipe(), os.pipe()
    with ChunkStore(tmp_path) as store:
        sample(0).put(store)
        claim = store.claim([KEY])
        pid = os.fork()
        if pid == 0:
            os.write(ready[1], b"x")
            os.read(done[0], 1)
            os._exit(0)
        os.read(ready[0], 1)
        claim.close()
        with store.claim([KEY]) as again:
            assert again.keys == {KEY}
    os.write(done[1], b"x")
    os.waitpid(pid, 0)
    for end in (*ready, *done):
        os.close(end)


def test_no_connection_is_inherited(tmp_path: Path) -> None:
    open_ones: list[sqlite3.Connection] = []

    def connect(file: Path) -> sqlite3.Connection:
        open_ones.append(sqlite3.connect(file, check_same_thread=False))
        return open_ones[-1]

    lines = Connections(tmp_path / "db", connect)
    with lines.lent() as connection:
        connection.execute("CREATE TABLE t (a)")
        with lines.lent() as same:
            assert same is connection

    def look() -> None:
        with pytest.raises(sqlite3.ProgrammingError, match="closed"):
            open_ones[0].execute("SELECT 1")

    in_child(look)
    with lines.lent() as connection:
        assert connection.execute("SELECT COUNT(*) FROM t").fetchall() == [(0,)]
    lines.close()
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        open_ones[-1].execute("SELECT 1")


def test_connections_of_a_database_that_is_opened_while_a_fork_is_prepared_wait_for_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that is in SQLite at a fork leaves a lock behind in the child, where the first use of SQLite would never end."""
    first, made = Connections(tmp_path / "first", sqlite3.connect), []
    real = Connections.before_fork

    def open_another() -> None:
        with Connections(tmp_path / "another", sqlite3.connect).lent():
            made.append("connected")

    thread = threading.Thread(target=open_another)

    def before_fork(lines: Connections, until: float) -> None:
        if lines is first:
            thread.start()
            thread.join(0.2)
        real(lines, until)

    def look() -> None:
        assert made == []

    monkeypatch.setattr(Connections, "before_fork", before_fork)
    in_child(look)
    thread.join()
    assert made == ["connected"]
    first.close()


@pytest.mark.parametrize("told", [True, False], ids=["told", "Ctrl-C came first"])
def test_of_two_threads_that_fork_at_once_both_are_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: bool
) -> None:
    """The end of the first one's fork says nothing of the second one's, which is still to come. Nobody waits for ever, told or not."""
    seen: queue.SimpleQueue[str] = queue.SimpleQueue()

    class Watched(threading.Condition):
        def wait(self, timeout: float | None = None) -> bool:
            seen.put("waits")
            return super().wait(timeout)

    with monkeypatch.context() as patch:
        patch.setattr(threading, "Condition", Watched)
        pool = Connections(tmp_path / "cache.db", sqlite3.connect)

    def use() -> None:
        with pool.lent():
            seen.put("lent")

    connections.forks_near.append(None)  # another thread is about to fork
    in_child(lambda: None)
    thread = threading.Thread(target=use)
    thread.start()
    assert seen.get(timeout=60) == "waits"
    connections.forks_near.pop()
    if told:
        connections.fork_is_over()
    while (found := seen.get(timeout=60)) == "waits":
        pass
    assert found == "lent"
    thread.join()
    pool.close()


@pytest.mark.parametrize("by", ["close", "giving back", "another fork"])
def test_a_fork_waits_while_a_connection_is_being_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    """A thread that closes one is in SQLite: a fork, which takes the lock, must not find it free meanwhile."""
    locks: list[Any] = []
    free: list[bool] = []

    class Known(threading.Condition):
        def __init__(self) -> None:
            locks.append(threading.RLock())
            super().__init__(locks[-1])

    class Line:
        def close(self) -> None:
            in_thread(lambda: free.append(locks[0].acquire(blocking=False)))

    def in_thread(work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

    with monkeypatch.context() as patch:
        patch.setattr(threading, "Condition", Known)
        pool = Connections(tmp_path / "cache.db", lambda _file: Line())  # type: ignore[arg-type, return-value]
    with pool.lent():
        if by == "giving back":
            in_thread(pool.close)
    if by == "close":
        pool.close()
    if by == "another fork":
        pool.before_fork(time.monotonic() + 60)
    assert free == [False]


def test_threads_leave_no_connection_behind(tmp_path: Path) -> None:
    def files() -> int:
        return sum("cache.db" in str(fd.readlink()) for fd in Path("/proc/self/fd").iterdir() if fd.exists())

    gc.collect()
    before = files()
    gc.disable()
    try:
        store = ChunkStore(tmp_path)
        sample(0).put(store, text="text")
        threads = [threading.Thread(target=lambda: list(store.texts())) for _ in range(8)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        store.close()
        assert files() == before
        # SQLite would have to wait for those that are left, on an index that must be made anew.
        (tmp_path / "index" / "cache.db").write_bytes(b"")
        with ChunkStore(tmp_path) as again:
            assert [text for _, text, _ in again.texts()] == ["text"]
    finally:
        gc.enable()


def test_a_log_that_goes_with_the_connections_closed_for_a_fork_is_not_missed(tmp_path: Path) -> None:
    """A thread may look for the log between a fork and the next connection. That it is gone says nothing then."""

    def connect(file: Path) -> sqlite3.Connection:
        made = sqlite3.connect(file, check_same_thread=False)
        made.execute("PRAGMA journal_mode = WAL")
        made.execute("CREATE TABLE IF NOT EXISTS Rows (number)")
        made.commit()
        return made

    pool = Connections(tmp_path / "cache.db", connect)
    log = tmp_path / "cache.db-wal"
    with pool.lent():
        assert log.exists()
    pool.before_fork(time.monotonic() + 5)
    assert not log.exists()
    assert not pool.has_lost_its_log()
    pool.after_fork()
    with pool.lent():
        assert not pool.has_lost_its_log()
        log.unlink()
        assert pool.has_lost_its_log()
    pool.close()
