"""Changes of a small store that are broken off at every one of their steps, and what must be true of the store afterwards."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from faulty_disk import EVERYTHING, Fault, faulty_disk
from store_samples import file_of, flip, sample

from cachetune_store import ChunkStore, StoreError, StoreFullError, UnknownDocumentError

SAMPLES = [sample(seed, tokens=20, layers=2) for seed in range(3)]
STALE = sample(8, tokens=20, layers=2, model="stale")
ADDED = sample(9, tokens=20, layers=2)
ALL = [*SAMPLES, STALE]
NUMBERED = [*ALL, ADDED]
DOCUMENTS = {"A": (0, 1), "B": (1, 2)}


def fill(path: Path) -> None:
    """Make the store: two documents that share a chunk, and a chunk of another model."""
    with ChunkStore(path) as store:
        for number, one in enumerate(ALL):
            one.put(store, text=f"text {number}")
        for name, numbers in DOCUMENTS.items():
            store.set_document(name, [SAMPLES[number].key for number in numbers])


@dataclass(frozen=True)
class Change:
    """A change of the store.

    Attributes:
        act: makes it.
        gone: numbers of samples that it removes.
        documents: what the documents hold afterwards.
        before: what happens to the store's files first, while it is closed.
        adds: whether it stores the sample `ADDED`.
    """

    act: Callable[[ChunkStore], object]
    gone: tuple[int, ...] = ()
    documents: tuple[tuple[str, tuple[int, ...]], ...] = tuple(DOCUMENTS.items())
    before: Callable[[Path], object] = lambda path: None
    adds: bool = False


def _remove(store: ChunkStore) -> None:
    with contextlib.suppress(UnknownDocumentError):  # done before
        store.delete_document("A")


def _lose_index(path: Path) -> None:
    shutil.rmtree(path / "index")


def _be_killed_before_the_index_knew(path: Path) -> None:
    """A chunk and a document are there, which the index doesn't know; their writer has left its mark, and half a file."""
    shutil.copytree(path / "index", path.with_name("index"))
    with ChunkStore(path) as store:
        ADDED.put(store, text="added")
        store.set_document("C", [ADDED.key])
    shutil.rmtree(path / "index")
    shutil.move(path.with_name("index"), path / "index")
    (path / "tmp" / "0.mark").touch()
    (path / "tmp" / "0.tmp").touch()


CHANGES = {
    "remove": Change(_remove, (0,), (("B", (1, 2)),)),
    "replace": Change(
        lambda store: store.set_document("A", [SAMPLES[1].key, SAMPLES[2].key]), (0,), (("A", (1, 2)), ("B", (1, 2)))
    ),
    "prune": Change(lambda store: store.prune(lambda head: head.namespace.model == "model"), (3,)),
    "verify": Change(lambda store: store.verify()),
    "set aside": Change(
        lambda store: store.verify(), (1,), before=lambda path: flip(file_of(path, SAMPLES[1].key), 5000)
    ),
    "rebuild": Change(lambda store: store.rebuild_index()),
    "store": Change(lambda store: ADDED.put(store, text="added"), adds=True),
    "note": Change(lambda store: store.settle_note("0" * 64, b"noted")),
    "delete a tenant": Change(lambda store: store.delete_tenant(""), (0, 1, 2, 3), ()),
    "add to a document": Change(
        lambda store: store.extend_document("B", [SAMPLES[0].key]), documents=(("A", (0, 1)), ("B", (1, 2, 0)))
    ),
}
OPENINGS = {
    "make a lost index": Change(lambda store: None, before=_lose_index),
    "compare after a crash": Change(
        lambda store: None,
        documents=(*DOCUMENTS.items(), ("C", (4,))),
        before=_be_killed_before_the_index_knew,
        adds=True,
    ),
}
"""Changes that opening the store makes."""


def failed_at_every_step(folder: Path, change: Change, kind: str, *, every: int = 1, first: int = 0) -> Iterator[str]:
    """Let each step of a change fail in turn, in a store of its own. Yields what is wrong.

    Args:
        folder: where the stores are made.
        change: the change.
        kind: name of the errno.
        every, first: which of the steps are tried.
    """
    filled, path = folder / "filled", folder / "store"
    if not filled.exists():
        fill(filled)
    step = first
    while True:
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(filled, path)
        change.before(path)
        fault = Fault(kind, EVERYTHING, after=step, count=1)
        error: Exception | None = None
        with ChunkStore(path, host_budget=0) as store:
            with faulty_disk(path, fault), _warnings() as warned:
                try:
                    change.act(store)
                except Exception as raised:
                    error = raised
            if not fault.met:
                return
            found = [*_unclear(error, kind, path)]
            if not warned:
                found += _unsound(store, change, "the same process")
        with ChunkStore(path, host_budget=0) as store:
            found += [*_unsound(store, change, "the next process"), *_apart(store, path, change)]
            change.act(store)
            found += [*_unsound(store, change, "a second run", done=True), *_apart(store, path, change)]
        yield from (f"step {step}, {kind} of {fault.struck}: {problem} ({error!r})" for problem in found)
        step += every


def killed_at_every_step(
    folder: Path, change: Change, *, bystander: bool = False, every: int = 1, first: int = 0
) -> Iterator[str]:
    """Kill a process by SIGKILL before each step of opening a store, a change, and closing, each time in a store of its own.

    Yields what is wrong.

    Args:
        folder: where the stores are made.
        change: the change.
        bystander: whether another process has the store open all along, and makes the change then. Else the store is opened after it.
        every, first: which of the steps are tried.
    """
    filled, path = folder / "filled", folder / "store"
    if not filled.exists():
        fill(filled)

    def begin() -> None:
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(filled, path)
        change.before(path)

    begin()
    with ChunkStore(path, host_budget=0) as store:
        change.act(store)
    whole = _names(path)
    step = first
    while True:
        begin()
        open_before = ChunkStore(path, host_budget=0) if bystander else None
        code = _forked(partial(_open_and_change, path, change, Fault("killed", EVERYTHING, after=step, count=1)))
        if code == 0:
            if open_before is not None:
                open_before.close()
            return
        found = [] if code == -signal.SIGKILL else [f"ended with {code}"]
        if open_before is not None:
            with open_before:
                found += _unsound(open_before, change, "a process that had it open")
                change.act(open_before)
                found += _unsound(open_before, change, "a process that had it open", done=True)
        with ChunkStore(path, host_budget=0) as store:
            found += [*_unsound(store, change, "the next process"), *_apart(store, path, change)]
            change.act(store)
            found += [*_unsound(store, change, "a second run", done=True), *_apart(store, path, change)]
        if (names := _names(path)) != whole:
            found.append(f"left behind: {sorted(names - whole)}, missing: {sorted(whole - names)}")
        yield from (f"killed before step {step}: {problem}" for problem in found)
        step += every


def _open_and_change(path: Path, change: Change, fault: Fault) -> None:
    with faulty_disk(path, fault), ChunkStore(path, host_budget=0) as store:
        change.act(store)


def _forked(work: Callable[[], object]) -> int:
    """Do it in a forked process. Returns the exit code, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _names(path: Path) -> set[str]:
    """All files, without those that SQLite keeps beside its database and takes away again, and times in the names of those set aside."""
    files = (str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())
    return {re.sub(r"\d{20}-", "", name) for name in files if not name.endswith(("-wal", "-shm"))}


@contextmanager
def _warnings() -> Iterator[list[logging.LogRecord]]:
    """What the store logs inside."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append  # type: ignore[method-assign]
    logger = logging.getLogger("cachetune_store")
    logger.addHandler(handler)
    try:
        yield records
    finally:
        logger.removeHandler(handler)


def _unclear(error: Exception | None, kind: str, path: Path) -> Iterator[str]:
    if error is None:
        return
    if not isinstance(error, StoreError) or str(path) not in str(error):
        yield "the error isn't the store's own, or names no path"
    if kind == "ENOSPC" and not isinstance(error, StoreFullError):
        yield "the error doesn't say that the disk is full"


def _unsound(store: ChunkStore, change: Change, when: str, *, done: bool = False) -> Iterator[str]:
    """What a store must never have lost, and, if the change is done, what it must not have any more."""
    held = {info.id: info.chunks for info in store.documents()}
    after, before = (
        {name: tuple(NUMBERED[n].key for n in numbers) for name, numbers in of}
        for of in (change.documents, DOCUMENTS.items())
    )
    for name in {*held, *before, *after}:
        if held.get(name) != after.get(name) and (done or held.get(name) != before.get(name)):
            yield f"{when} finds document {name} with {held.get(name)}"
    texts = {key for key, _, _ in store.texts()}
    for number, one in enumerate([*ALL, ADDED] if done and change.adds else ALL):
        if number in change.gone:
            kept = number < 3 and change.documents == tuple(
                DOCUMENTS.items()
            )  # a document holds its chunk, stored or not
            if done and (store.contains(one.key) or (one.key in texts and not kept)):
                yield f"{when} finds sample {number}, which was to go"
            continue
        reader = store.open(one.key)
        if reader is None or one.key not in texts:
            yield f"{when} has lost sample {number}"
            continue
        with reader:
            if not one.matches(reader):
                yield f"{when} finds wrong rows"


def _apart(store: ChunkStore, path: Path, change: Change) -> Iterator[str]:
    """Where index and files differ in a store that has just been opened or changed."""
    files = [file.stat().st_size for file in (path / "chunks").glob("*/*")]
    disk = store.stats().disk
    assert disk is not None
    if (disk.chunks, disk.bytes) != (len(files), sum(files)):
        yield f"the index counts {disk.chunks} chunks and {disk.bytes} bytes, and there are {len(files)} and {sum(files)}"
    report = store.verify()
    planted = [SAMPLES[number].key for number in change.gone if number < 3]
    if set(report.damaged) - set(planted) or (report.adopted, report.dropped, report.temp_files) != (0, 0, 0):
        yield f"verify has something to mend: {report}"
