"""The folder of a store, which doesn't change after it was opened, and folders that can't be written."""

from __future__ import annotations

import errno
import os
import stat
import threading
from pathlib import Path
from typing import Any

import pytest
from read_only_folder import make_read_only
from store_samples import file_of, sample

from cachetune_store import ChunkStore, StoreError, StorePathError, StoreReadOnlyError, directory
from cachetune_store.diskindex import DiskIndex
from cachetune_store.errors import IndexReplacedError
from cachetune_store.locks import OwnDescriptor
from cachetune_store.paths import is_store, other_files
from cachetune_store.readonlyindex import ReadOnlyIndex
from cachetune_store.units import NO_LIMIT

KEY = sample(0).key


@pytest.mark.parametrize("given", ["~/kv", "$PLACE/kv", "${PLACE}/kv", "~/../home/$NAME"])
def test_a_path_with_home_and_variables_names_one_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    home, here, there = tmp_path / "home", tmp_path / "here", tmp_path / "there"
    for folder in (home, here, there):
        folder.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("PLACE", str(home))
    monkeypatch.setenv("NAME", "kv")
    monkeypatch.chdir(here)
    old = os.umask(0o022)
    try:
        with ChunkStore(given) as store:
            sample(0).put(store, text="secret")
            store.set_document("secret", [KEY])
            monkeypatch.chdir(there)
            monkeypatch.setenv("PLACE", "/nowhere")
            monkeypatch.setenv("HOME", "/nowhere")
            sample(1).put(store)
            store.rebuild_index()
            with store.claim([KEY]):
                assert store.settle_note("0" * 64, b"note") == b"note"
    finally:
        os.umask(old)
    assert list(here.iterdir()) == list(there.iterdir()) == []
    assert [entry.name for entry in home.iterdir()] == ["kv"]
    for entry in (home / "kv").rglob("*"):
        assert stat.S_IMODE(entry.stat().st_mode) == (0o700 if entry.is_dir() else 0o600), entry
    with ChunkStore(home / "kv") as store:
        assert store.stats().disk.chunks == 2  # type: ignore[union-attr]


def test_a_relative_path_stays_what_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path)
    with ChunkStore("kv", host_budget=0) as store:
        assert store.path == tmp_path / "kv"
        sample(0).put(store)
        monkeypatch.chdir("below")
        with store.open(KEY) as reader:  # type: ignore[union-attr]
            assert sample(0).matches(reader)
        sample(1).put(store)
        assert store.verify().ok
    assert list((tmp_path / "below").iterdir()) == []


@pytest.mark.parametrize("given", ["", "$UNSET_ANYWHERE/kv", "${UNSET_ANYWHERE}", "~no-such-user/kv", "a\0b", 7, b"kv"])
def test_a_path_that_names_nothing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: object) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StorePathError, match="store path"):
        ChunkStore(given)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store in a folder that turned read-only."""
    path = tmp_path / "store"
    with ChunkStore(path) as store:
        for seed in range(2):
            sample(seed).put(store, text=f"text {seed}")
        store.set_document("doc", [KEY, sample(1).key])
        store.settle_note("0" * 64, b"note")
    make_read_only(path, monkeypatch)
    return path


def names_and_times(path: Path) -> dict[str, int]:
    # But for what SQLite keeps beside a database, where this user may write after all.
    entries = [entry for entry in path.rglob("*") if entry.is_file() and not entry.name.startswith("cache.db-")]
    return {str(entry): entry.stat().st_mtime_ns for entry in entries}


@pytest.mark.parametrize("index", ["there", "lost", "with a log"])
def test_a_store_that_may_only_be_read_answers(path: Path, index: str) -> None:
    for entry in (path / "index").iterdir():
        if index == "lost":
            (path / "index").chmod(0o700)
            entry.unlink()
    if index == "with a log":
        (path / "index").chmod(0o700)
        (path / "index" / "cache.db-wal").write_bytes(b"left behind")
        (path / "index").chmod(0o500)
    before = names_and_times(path)
    with ChunkStore(path, host_budget=0) as store:
        assert store.read_only
        for seed in range(2):
            with store.open(sample(seed).key) as reader:  # type: ignore[union-attr]
                assert sample(seed).matches(reader)
        assert [info.id for info in store.documents()] == ["doc"]
        assert sorted(text for _, text, _ in store.texts()) == ["text 0", "text 1"]
        assert store.note("0" * 64) == b"note"
        assert store.stats().documents == 1
        assert [group.chunks for group in store.groups()] == [2]
        assert sample(0).put(store) > 0, "it is stored already"
        with store.claim([KEY]) as claim:
            assert claim.keys == {KEY}
        store.prune(lambda _: False, dry_run=True)
    assert names_and_times(path) == before


def test_an_index_that_is_being_made_anew_is_not_whole_for_who_may_only_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its documents and texts seemed to be gone. Meanwhile they are found by the files, and afterwards the new index is read."""
    with ChunkStore(tmp_path) as store:
        sample(0).put(store, text="text 0")
        store.set_document("doc", [KEY])
    with monkeypatch.context() as patch:
        refuse(patch, tmp_path / "chunks", os.W_OK)
        reading = ChunkStore(tmp_path, host_budget=0)
    with reading, ChunkStore(tmp_path) as store:
        assert reading.read_only
        assert not store.read_only

        def found() -> tuple[list[str], list[str]]:
            return [info.id for info in reading.documents()], sorted(text for _, text, _ in reading.texts())

        assert found() == (["doc"], ["text 0"])
        during = []

        def make_half_of_it() -> None:
            with store.index.made_anew("cut short"):
                during.append(found())
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            make_half_of_it()
        assert during == [(["doc"], ["text 0"])]
        assert found() == (["doc"], ["text 0"])
        store.rebuild_index()
        sample(1).put(store, text="text 1")
        store.set_document("another", [sample(1).key])
        assert found() == (["another", "doc"], ["text 0", "text 1"])


def test_what_a_thread_fills_for_who_may_only_read_is_not_seen_by_others_before_it_is_whole(tmp_path: Path) -> None:
    DiskIndex(tmp_path).close()
    index = ReadOnlyIndex(tmp_path)
    seen: list[object] = []

    def look() -> None:
        try:
            seen.append(index.get("name"))
        except IndexReplacedError:
            seen.append("not whole")

    def look_from_another_thread() -> None:
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()

    with index.made_anew("id"):
        index.set("name", 1)
        look()
        look_from_another_thread()
    look_from_another_thread()
    assert seen == [1, "not whole", 1]
    index.close()


def test_a_store_that_may_only_be_read_says_why_it_changes_nothing(path: Path) -> None:
    with ChunkStore(path) as store:
        for action in (
            lambda: sample(5).put(store),
            lambda: store.set_document("doc", []),
            lambda: store.extend_document("doc", []),
            lambda: store.delete_document("doc"),
            lambda: store.delete_tenant(""),
            lambda: store.settle_note("1" * 64, b"new"),
            lambda: store.prune(lambda _: False),
            store.verify,
            store.rebuild_index,
        ):
            with pytest.raises(StoreReadOnlyError, match=r"can only be read here \(.*\)"):
                action()
        assert [info.id for info in store.documents()] == ["doc"]


def test_a_damaged_chunk_of_a_store_that_may_only_be_read_is_a_miss(path: Path) -> None:
    file = file_of(path, KEY)
    file.chmod(0o600)
    file.write_bytes(b"short")
    with ChunkStore(path, host_budget=0) as store:
        errors: list[StoreError] = []
        assert store.open(KEY, errors=errors) is None
        with store.open(sample(1).key) as reader:  # type: ignore[union-attr]
            assert sample(1).matches(reader)


def test_a_new_store_in_a_folder_that_may_only_be_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> OwnDescriptor:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(directory, "open_lock", refuse)
    with pytest.raises(StorePathError, match="that this user can write"):
        ChunkStore(tmp_path)


def test_a_store_whose_folder_is_removed_while_open_says_so(tmp_path: Path) -> None:
    place = tmp_path / "kv"
    with ChunkStore(place) as store:
        sample(0).put(store)
        place.rename(tmp_path / "elsewhere")
        with pytest.raises(StorePathError, match="removed or renamed while it was open"):
            sample(1).put(store)
        with pytest.raises(StorePathError, match="removed or renamed while it was open"):
            store.verify()


@pytest.mark.parametrize(
    "part",
    ["tmp", "tmp/gate.lock", "claims.lock", "lock", "index.lock", "index", "index/cache.db", "chunks", "documents"],
)
def test_a_store_of_which_a_part_cannot_be_written_is_only_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, part: str
) -> None:
    with ChunkStore(tmp_path) as store:
        sample(0).put(store)
        store.set_document("doc", [KEY])
        store.settle_note("0" * 64, b"note")
    refuse(monkeypatch, tmp_path / part, os.W_OK)
    with caplog.at_level("WARNING", "cachetune_store"), ChunkStore(tmp_path, host_budget=0) as store:
        assert store.read_only
        with store.open(KEY) as reader:  # type: ignore[union-attr]
            assert sample(0).matches(reader)
        assert [info.id for info in store.documents()] == ["doc"]
        with pytest.raises(StoreReadOnlyError, match=f"{tmp_path / part}: Permission denied"):
            sample(1).put(store)
    # A thread of another test's store may still say something of its own.
    said = [record.getMessage() for record in caplog.records if record.name == "cachetune_store.directory"]
    assert [f"{tmp_path / part} can't be written (Permission denied)" in line for line in said] == [True]


@pytest.mark.parametrize("part", ["store.json", "chunks", "documents"])
def test_a_store_of_which_a_part_cannot_be_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """Otherwise the store would seem to be empty."""
    with ChunkStore(tmp_path) as store:
        sample(0).put(store)
        store.set_document("doc", [KEY])
    refuse(monkeypatch, tmp_path / part, os.R_OK | os.W_OK)
    with pytest.raises(StorePathError, match=f"can't read {tmp_path / part} .*check .* permissions"):
        ChunkStore(tmp_path)


def refuse(monkeypatch: pytest.MonkeyPatch, part: Path, access: int) -> None:
    """Take an access to a part of a store away, also from root, whom permissions do not stop."""
    open_, access_ = os.open, os.access
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT

    def opened(place: Any, flags: int, *args: Any, **options: Any) -> int:
        if Path(place) == part and (access & os.R_OK or flags & writing):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(place))
        return open_(place, flags, *args, **options)

    def allowed(place: Any, mode: int, **options: Any) -> bool:
        return not (Path(place) == part and mode & access) and access_(place, mode, **options)

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "access", allowed)


def test_a_folder_says_whether_it_is_a_store_and_what_else_lies_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "kv"
    assert (is_store(folder), other_files(folder)) == (False, [])
    ChunkStore(folder, disk_budget=NO_LIMIT).close()
    assert (is_store(folder), other_files(folder)) == (True, [])
    (folder / "mine.txt").touch()
    assert other_files(folder) == ["mine.txt"]
