"""Damage: files of a store are changed at random, and the index too; every change must be noticed before it is used.

Each example harms a fresh copy of a store, asks every prompt, and checks that the answers are those of a fresh engine that
misses what the report says was missed; that damaged files were set aside and counted; and that the store is whole afterwards.
"""

from __future__ import annotations

import dataclasses
import random
import shutil
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from soak_common import Corpus, Outcome, bytes_below

from cachetune_rag import CacheTune
from cachetune_store import ChunkKey
from cachetune_store.chunkfile import encode_head, parse_head
from cachetune_store.rawfile import DirectIO, RawFile
from cachetune_store.seals import CHECKSUMS

CHUNK_HARM = ("flip", "flips", "truncate", "empty", "extend", "zero", "swap", "copy", "stale", "older", "delete")
INDEX_HARM = ("flip index", "truncate index", "overwrite index", "delete index", "foreign index", "flip log")
DOCUMENT_HARM = ("flip document", "delete documents")


@dataclass(frozen=True)
class Harm:
    """One change: its kind, and the number that says which file and which bytes."""

    kind: str
    number: int

    def draw(self) -> random.Random:
        """The same random numbers every time."""
        return random.Random(self.number)


HARM = st.builds(Harm, st.sampled_from(CHUNK_HARM * 3 + INDEX_HARM + DOCUMENT_HARM), st.integers(0, (1 << 64) - 1))


def run(folder: Path, *, examples: int, first_seed: int = 0, corpus: Corpus | None = None) -> Outcome:
    """Try `examples` random sets of changes."""
    started = time.perf_counter()
    outcome = Outcome("damage")
    stage = _Stage(folder, corpus or Corpus())
    harmed: Counter[str] = Counter()

    @seed(first_seed)
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    @given(harms=st.lists(HARM, min_size=1, max_size=3), running=st.booleans(), host=st.booleans())
    def every_change_is_noticed(harms: list[Harm], running: bool, host: bool) -> None:
        stage.play(harms, running=running, host=host)
        harmed.update(harm.kind for harm in harms)

    try:
        every_change_is_noticed()
    except Exception:
        outcome.problems.append(traceback.format_exc())
    outcome.figures |= {
        "examples": stage.played,
        "changes": sum(harmed.values()),
        "files set aside": stage.set_aside,
        "changes by kind": dict(sorted(harmed.items())),
    }
    outcome.seconds = time.perf_counter() - started
    return outcome


class _Stage:
    """A store to copy, and others to take wrong files from."""

    def __init__(self, folder: Path, corpus: Corpus):
        self._corpus, self._folder = corpus, folder
        self.played = self.set_aside = 0
        self._whole, self._foreign, self._older = folder / "whole", folder / "foreign", folder / "older"
        documents = [prompt.document for prompt in corpus.prompts]
        with corpus.engine(self._whole) as engine:
            engine.precompute(documents)
        with corpus.engine(self._foreign, tenant="somebody else") as engine:
            engine.precompute(documents)
        with corpus.engine(self._older) as engine:
            engine.precompute(documents)
        for path in self._older.glob("chunks/*/*"):
            _forget_text(path)

    def play(self, harms: list[Harm], *, running: bool, host: bool) -> None:
        """Harm a copy of the store, before it is opened or while it is in use, and check what a user relies on."""
        self.played += 1
        folder = self._folder / "copy"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self._whole, folder)
        options = {} if host else {"host_budget": 0}
        if not running:
            self._harm(folder, harms)
            bad = self._changed(folder)
        with self._corpus.engine(folder, **options) as engine:
            if running:
                self._harm(folder, harms)
                bad = self._changed(folder)
            self._ask_all(engine)
            self._check(folder, engine, harms, bad)

    def _check(self, folder: Path, engine: CacheTune, harms: list[Harm], bad: set[str]) -> None:
        store = engine.store
        store.verify()
        assert not self._changed(folder), "verify left changed files"
        aside = {path.stem.split("-")[1] for path in (folder / "damaged").glob("*")}
        assert aside == bad, f"set aside: {sorted(aside)}; damaged: {sorted(bad)}"
        assert store.stats().damaged >= len(bad), f"{store.stats().damaged} counted of {len(bad)}"
        self.set_aside += len(aside)
        self._ask_all(engine)
        report = store.verify()
        assert (report.damaged, report.adopted, report.dropped) == ((), 0, 0), f"not whole after all: {report}"
        assert store.stats().disk.bytes == bytes_below(folder / "chunks")
        asked = [engine.prefill(query=p.query, chunks=p.chunks).report for p in self._corpus.prompts]
        assert all(report.missed == 0 for report in asked), "a chunk that was missed was not stored again"
        if not {harm.kind for harm in harms} & {*DOCUMENT_HARM}:
            assert store.stats().documents == len(self._corpus.prompts)

    def _ask_all(self, engine: CacheTune) -> None:
        for number in range(len(self._corpus.prompts)):
            wrong = self._corpus.ask(engine, number)
            assert wrong is None, wrong

    def _changed(self, folder: Path) -> set[str]:
        """Keys of files that are not, byte for byte, what was stored, or what an older version of the store held."""
        changed = set()
        for path in folder.glob("chunks/*/*"):
            place = path.relative_to(folder)
            if path.read_bytes() not in ((self._whole / place).read_bytes(), (self._older / place).read_bytes()):
                changed.add(path.stem)
        return changed

    def _harm(self, folder: Path, harms: list[Harm]) -> None:
        for harm in harms:
            if harm.kind in CHUNK_HARM:
                self._harm_chunk(folder, harm)
            elif harm.kind in INDEX_HARM:
                self._harm_index(folder / "index", harm)
            else:
                _harm_documents(folder / "documents", harm)

    def _harm_chunk(self, folder: Path, harm: Harm) -> None:
        files = sorted(folder.glob("chunks/*/*"))
        if not files:
            return
        rng = harm.draw()
        file, other = rng.choices(files, k=2)
        foreign = rng.choice(sorted(self._foreign.glob("chunks/*/*")))
        older = self._older / file.relative_to(folder)
        content = file.read_bytes()
        changes: dict[str, Callable[[], object]] = {
            "flip": lambda: file.write_bytes(_flipped(content, rng)),
            "flips": lambda: file.write_bytes(_flipped(content, rng, 3)),
            "truncate": lambda: file.write_bytes(content[: rng.randrange(len(content) or 1)]),
            "empty": lambda: file.write_bytes(b""),
            "extend": lambda: file.write_bytes(content + bytes(rng.randrange(1, 9000))),
            "zero": lambda: file.write_bytes(_zeroed(content, rng)),
            "swap": lambda: (file.write_bytes(other.read_bytes()), other.write_bytes(content)),
            "copy": lambda: file.write_bytes(other.read_bytes()),
            "stale": lambda: file.write_bytes(foreign.read_bytes()),
            "older": lambda: file.write_bytes(older.read_bytes()),
            "delete": file.unlink,
        }
        changes[harm.kind]()

    def _harm_index(self, index: Path, harm: Harm) -> None:
        rng = harm.draw()
        database = index / "cache.db"
        if harm.kind == "delete index" or not database.exists():
            shutil.rmtree(index, ignore_errors=True)
        elif harm.kind == "foreign index":
            shutil.rmtree(index)
            shutil.copytree(self._foreign / "index", index)
        elif harm.kind == "flip log":
            for log in index.glob("*-wal"):
                log.write_bytes(_flipped(log.read_bytes(), rng, 5))
        else:
            content = database.read_bytes()
            if harm.kind == "flip index":
                content = _flipped(content, rng, 20)
            elif harm.kind == "truncate index":
                content = content[: rng.randrange(len(content) + 1)]
            else:
                content = rng.randbytes(len(content))
            # In place, as bits rot: processes that have the file open see it.
            database.write_bytes(content)


def _harm_documents(folder: Path, harm: Harm) -> None:
    files = sorted(folder.glob("*/*.json"))
    rng = harm.draw()
    if harm.kind == "delete documents":
        shutil.rmtree(folder, ignore_errors=True)
    elif files:
        file = rng.choice(files)
        file.write_bytes(_flipped(file.read_bytes(), rng))


def _flipped(content: bytes, rng: random.Random, bits: int = 1) -> bytes:
    changed = bytearray(content)
    for _ in range(bits if changed else 0):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _zeroed(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    if changed:
        start = rng.randrange(len(changed))
        stop = min(len(changed), start + rng.randrange(1, 5000))
        changed[start:stop] = bytes(stop - start)
    return bytes(changed)


def _forget_text(path: Path) -> None:
    """Turn a chunk file into the one that would have been written without its text."""
    key = ChunkKey(path.stem)
    file = RawFile(path, DirectIO(False))
    parsed = parse_head(key, file.size, file.head, CHECKSUMS)
    rows = path.read_bytes()[parsed.rows_start :]
    path.write_bytes(encode_head(dataclasses.replace(parsed.head, text=None)) + rows)
