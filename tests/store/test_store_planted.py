"""Other things in the place of a store's files: nothing blocks, nothing is read without end, and no link is followed."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sqlite3
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import xxhash
from store_samples import file_of, sample

from cachetune_store import ChunkStore, StorePathError, StoreVersionError
from cachetune_store.plainfiles import UnfitFileError, read_plain

KEY = sample(0).key
NOTE = "a" * 64


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A store of two chunks, a document and a note."""
    path = tmp_path / "store"
    with ChunkStore(path) as store:
        for seed in range(2):
            sample(seed).put(store, text=f"text {seed}")
        store.set_document("doc", [KEY, sample(1).key])
        store.settle_note(NOTE, b"agreed")
    return path


@contextmanager
def soon() -> Iterator[None]:
    """Interrupt a test that blocks, so that it fails."""

    def late(*_: object) -> None:
        raise AssertionError("it blocks")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(30)
    try:
        yield
    finally:
        signal.alarm(0)


def pipe(place: Path) -> None:
    os.mkfifo(place)


def endless(place: Path) -> None:
    place.symlink_to("/dev/zero")


def link(place: Path) -> None:
    other = place.parent.parent / "elsewhere"
    other.write_bytes(b"x" * 9000)
    place.symlink_to(other)


def folder(place: Path) -> None:
    (place / "below").mkdir(parents=True)


def sparse(place: Path) -> None:
    with place.open("wb") as file:
        file.truncate(100 << 30)


KINDS = [pipe, endless, link, folder, sparse]


def replace(place: Path, plant: Callable[[Path], None]) -> None:
    place.unlink(missing_ok=True)
    plant(place)


def is_sound(store: ChunkStore) -> None:
    for seed in range(2):
        sample(seed).put(store, text=f"text {seed}")
    report = store.verify()
    assert (report.checked, report.damaged, report.unreadable) == (2, (), ())
    assert store.stats().disk.chunks == 2  # type: ignore[union-attr]
    with store.open(KEY) as reader:  # type: ignore[union-attr]
        assert sample(0).matches(reader)


@pytest.mark.parametrize("plant", KINDS)
@pytest.mark.parametrize("rebuilt", [False, True])
def test_a_chunk_that_is_no_plain_file_is_set_aside(path: Path, plant: Callable[[Path], None], rebuilt: bool) -> None:
    replace(file_of(path, KEY), plant)
    if rebuilt:
        shutil.rmtree(path / "index")
    with soon(), ChunkStore(path, host_budget=0) as store:
        errors: list[Exception] = []
        assert store.open(KEY, errors=errors) is None  # type: ignore[arg-type]
        assert not os.path.lexists(file_of(path, KEY))
        assert rebuilt or errors
        is_sound(store)


@pytest.mark.parametrize("plant", KINDS)
def test_a_folder_that_a_chunk_is_written_over_is_set_aside(path: Path, plant: Callable[[Path], None]) -> None:
    with soon(), ChunkStore(path, host_budget=0) as store:
        replace(file_of(path, KEY), plant)
        assert store.contains(KEY) == (plant is sparse)
        sample(0).put(store, text="text 0")
        is_sound(store)


@pytest.mark.parametrize("plant", KINDS)
def test_a_document_that_is_no_plain_file_is_passed_over(path: Path, plant: Callable[[Path], None]) -> None:
    (known,) = (path / "documents").glob("*/*.json")
    plant(known.with_name(f"{'0' * 64}.json"))
    replace(known, plant)
    with soon(), ChunkStore(path) as store:
        store.verify()
        assert [info.id for info in store.documents()] == ["doc"]
    assert json.loads(known.read_bytes())["id"] == "doc", "the index knew it, so it was written again"
    shutil.rmtree(path / "index")
    with soon(), ChunkStore(path) as store:
        assert [info.id for info in store.documents()] == ["doc"]


@pytest.mark.parametrize("plant", KINDS)
def test_a_description_that_is_no_plain_file_is_set_aside(path: Path, plant: Callable[[Path], None]) -> None:
    replace(path / "store.json", plant)
    with soon(), ChunkStore(path) as store:
        assert [info.id for info in store.documents()] == ["doc"]
        is_sound(store)
    assert len(list((path / "damaged").iterdir())) == 1


def test_a_description_of_brackets_is_damage(path: Path) -> None:
    (path / "store.json").write_text("[" * 60_000)
    with pytest.raises(StoreVersionError, match="delete that file"):
        ChunkStore(path)


@pytest.mark.parametrize("plant", KINDS[:-1])
def test_a_note_that_is_no_plain_file_gives_way(path: Path, plant: Callable[[Path], None]) -> None:
    (note,) = (path / "notes").glob("*/*.json")
    replace(note, plant)
    with soon(), ChunkStore(path) as store:
        assert store.note(NOTE) == b""
        assert store.discard_note(NOTE, b"")
        assert store.settle_note(NOTE, b"anew") == b"anew"


@pytest.mark.parametrize("plant", KINDS[:-1])
@pytest.mark.parametrize("name", ["lock", "claims.lock", "index.lock", "tmp/gate.lock"])
def test_a_lock_that_is_no_plain_file_is_named_at_once(path: Path, plant: Callable[[Path], None], name: str) -> None:
    replace(path / name, plant)
    with (
        soon(),
        pytest.raises(StorePathError, match=f"{name} is a .*, not a plain file: remove it"),
        ChunkStore(path) as store,
    ):
        store.verify()


@pytest.mark.parametrize("plant", KINDS)
@pytest.mark.parametrize("name", ["index/cache.db", "index/cache.db-wal", "index/cache.db-shm", "index"])
@pytest.mark.parametrize("running", [False, True])
def test_an_index_that_is_no_plain_file_is_made_anew(
    path: Path, plant: Callable[[Path], None], name: str, running: bool
) -> None:
    def harm() -> None:
        if name == "index":
            shutil.rmtree(path / "index")
        replace(path / name, plant)

    if name == "index" and plant is folder:
        name = "index/cache.db-journal"  # a folder is what belongs there
    with soon():
        if not running:
            harm()
        with ChunkStore(path) as store:
            if running:
                harm()
            is_sound(store)
            assert [info.id for info in store.documents()] == ["doc"]
    assert stat.S_ISREG((path / "index" / "cache.db").lstat().st_mode)


@pytest.mark.parametrize(
    "row", [("disk_bogus", 1), ("sqlite_synchronous; DROP TABLE Cache", "0"), ("_con", 5), (7, 7), ("get", None)]
)
def test_settings_that_the_index_never_had_are_not_followed(path: Path, row: tuple[object, object]) -> None:
    with sqlite3.connect(path / "index" / "cache.db") as db:
        db.execute("INSERT OR REPLACE INTO Settings VALUES (?, ?)", row)
    with ChunkStore(path) as store:
        is_sound(store)
    with sqlite3.connect(path / "index" / "cache.db") as db:
        assert row[0] not in [name for (name,) in db.execute("SELECT key FROM Settings")]


@pytest.mark.parametrize(
    ("name", "record"),
    [
        ("total", {"bytes": "x"}),
        (f"chunk/{KEY}", [1]),
        (f"chunk/{KEY}", {"size": -1, "used": 0, "tokens": 1}),
        (f"text/{KEY}", {"text": 1, "tokens": 1, "namespace": ""}),
        (f"ref/{KEY}", "many"),
        ("texts", {}),
        ("doc/0/0", {"id": "a", "tenant": "", "chunks": [1]}),
    ],
)
def test_a_record_that_the_store_never_writes_is_damage(path: Path, name: str, record: object) -> None:
    text = json.dumps([name, record], separators=(",", ":"))
    row = (name, xxhash.xxh3_64_hexdigest(text.encode()) + text)
    with sqlite3.connect(path / "index" / "cache.db") as db:
        db.execute("DELETE FROM Cache WHERE key = ?", row[:1])
        db.execute("INSERT INTO Cache (key, raw, mode, value, store_time) VALUES (?, 1, 1, ?, 0)", row)
    with ChunkStore(path) as store:
        store.set_document("doc", [KEY])
        store.set_document("doc", [KEY, sample(1).key])
        list(store.texts())
        store.revision()
        is_sound(store)
        assert [info.id for info in store.documents()] == ["doc"]


def test_descriptors_used_up_are_named_as_the_reason(path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ChunkStore(path, host_budget=0) as store:
        held = [os.open(os.devnull, os.O_RDONLY)]
        resource.setrlimit(resource.RLIMIT_NOFILE, (held[0] + 1, hard))
        try:
            errors: list[Exception] = []
            assert store.open(KEY, errors=errors) is None  # type: ignore[arg-type]
            messages = [str(error) for error in errors]
            for action in (lambda: ChunkStore(path), lambda: store.set_document("b", [KEY])):
                with pytest.raises(StorePathError) as error:
                    action()
                messages.append(str(error.value))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            os.close(held[0])
        assert len(messages) == 3
        assert all("ulimit -n" in message and "permission" not in message for message in messages), messages
        assert store.stats().damaged == 0
        is_sound(store)


def test_reading_is_bounded(tmp_path: Path) -> None:
    sparse(tmp_path / "long")
    with pytest.raises(UnfitFileError, match="longer than 10 bytes"):
        read_plain(tmp_path / "long", 10)
    (tmp_path / "short").write_bytes(b"0123456789")
    assert read_plain(tmp_path / "short", 10) == b"0123456789"
