"""Crashes: processes that precompute, answer, evict and mend are killed at random moments; then the store is examined.

And changes of a small store, of which a process is killed before each step in turn.

Two stores: one large enough for everything, in which every chunk and document whose storing was reported must be found
again, and one with room for a few chunks, in which processes evict each other's.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "store"))

from broken_off import CHANGES, OPENINGS, killed_at_every_step
from soak_common import Corpus, Outcome, Worker, bytes_below
from store_samples import sample

from cachetune_store import ChunkStore

ROUNDS_A_STORE = 10
"""A store is thrown away after this many rounds, so that looking through it stays quick."""
SMALL_BUDGET = 700_000
"""Bytes: about seven chunks of the corpus."""
LARGEST_CHUNK = 170_000

Tell = Callable[..., None]


def run(folder: Path, *, kills: int, every: int | None = None, seed: int = 0, corpus: Corpus | None = None) -> Outcome:
    """Kill `kills` processes at random moments, at least; and others before each `every`-th step of each change (None: no others)."""
    started = time.perf_counter()
    outcome = Outcome("crashes")
    corpus = corpus or Corpus()
    rng = random.Random(seed)
    large, small = folder / "large", folder / "small"
    evicting = {"disk_budget": SMALL_BUDGET}
    roles: dict[str, Callable[[Tell, random.Random], None]] = {
        "precompute": lambda tell, rng: _precompute(corpus, large, rng, tell),
        "write": lambda tell, rng: _write(large, rng, tell),
        "serve": lambda tell, rng: _serve(corpus, large, {}, rng, tell),
        "mend": lambda tell, rng: _mend(large, tell),
        "serve and evict": lambda tell, rng: _serve(corpus, small, evicting, rng, tell),
        "precompute and evict": lambda tell, rng: _evict(corpus, small, evicting, rng, tell),
    }
    book = _Book()
    killed = dict.fromkeys(roles, 0)
    rounds = found = 0
    while sum(killed.values()) < kills and len(outcome.problems) < 20:
        if rounds % ROUNDS_A_STORE == 0:
            shutil.rmtree(large, ignore_errors=True)
            shutil.rmtree(small, ignore_errors=True)
            book.clear()
        rounds += 1
        workers = {
            name: Worker(_started(roles[name], random.Random(rng.random()))) for name in rng.sample(sorted(roles), 3)
        }
        for worker in workers.values():
            # One that isn't ready killed itself while it opened the store, or failed: its exit code will tell.
            if worker.wait_for("ready", 60):
                time.sleep(rng.random() ** 2 * 0.3)
                worker.kill()
        for name, worker in workers.items():
            code = worker.join(60)
            outcome.expect(code == -signal.SIGKILL, f"{name} ended with {code}: {worker.of_kind('error')}")
            outcome.problems += [f"{name}: {text}" for (text,) in worker.of_kind("wrong")]
            killed[name] += code == -signal.SIGKILL
            book.note(worker)
        if large.exists():
            found += _examined(outcome, lambda tell: _examine(corpus, large, book, {}, tell))
        if small.exists():
            _examined(outcome, lambda tell: _examine(corpus, small, _Book(), evicting, tell))
    if every is not None:
        _kill_at_steps(outcome, folder / "steps", every)
    outcome.figures |= {"kills": sum(killed.values()), "rounds": rounds, "chunks found again": found, "killed": killed}
    outcome.seconds = time.perf_counter() - started
    return outcome


def _kill_at_steps(outcome: Outcome, folder: Path, every: int) -> None:
    folder.mkdir()
    for bystander, changes in ((False, CHANGES), (True, CHANGES), (False, OPENINGS)):
        for name, change in changes.items():
            # Other steps where another process has the store open.
            first = every // 2 if bystander else 0
            problems = killed_at_every_step(folder, change, bystander=bystander, every=every, first=first)
            outcome.problems += [f"{name}: {problem}" for problem in problems]


class _Book:
    """What processes said that they had stored."""

    def __init__(self) -> None:
        self.samples: set[int] = set()
        self.documents: set[int] = set()

    def clear(self) -> None:
        self.samples.clear()
        self.documents.clear()

    def note(self, worker: Worker) -> None:
        for kind, *rest in worker.messages:
            if kind == "stored":
                self.samples.add(rest[0])
            elif kind == "document":
                self.documents.add(rest[0])
            elif kind == "removing":
                self.documents.discard(rest[0])


# -- what the processes do until they are killed ------------------------------------------------------------------------


def _started(role: Callable[[Tell, random.Random], None], rng: random.Random) -> Callable[[Tell], None]:
    """The role; half of the time it kills itself, just before or after some call that changes files."""

    def work(tell: Tell) -> None:
        if rng.random() < 0.5:
            _light_fuse(rng)
        role(tell, rng)

    return work


def _light_fuse(rng: random.Random) -> None:
    left = [rng.randrange(1, 60)]
    before = rng.random() < 0.5

    def wrap(name: str) -> None:
        real = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] <= 0 and before:
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*args, **kwargs)
            if left[0] <= 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(os, name, call)

    for name in ("fsync", "replace", "unlink", "mkdir"):
        wrap(name)


def _precompute(corpus: Corpus, path: Path, rng: random.Random, tell: Tell) -> None:
    with corpus.engine(path) as engine:
        tell("ready")
        while True:
            number = rng.randrange(len(corpus.prompts))
            document = corpus.prompts[number].document
            if rng.random() < 0.3:
                tell("removing", number)
                engine.remove(document.id, missing_ok=True)
            else:
                engine.precompute([document])
                tell("document", number)


def _write(path: Path, rng: random.Random, tell: Tell) -> None:
    with ChunkStore(path) as store:
        tell("ready")
        while True:
            number = rng.randrange(1 << 30)
            sample(number, tokens=rng.randrange(1, 400)).put(store, text=f"sample {number}")
            tell("stored", number)


def _serve(corpus: Corpus, path: Path, options: dict[str, Any], rng: random.Random, tell: Tell) -> None:
    with corpus.engine(path, host_budget=0, **options) as engine:
        tell("ready")
        while True:
            ask = rng.choice((corpus.ask, corpus.generate))
            if wrong := ask(engine, rng.randrange(len(corpus.prompts))):
                tell("wrong", wrong)


def _mend(path: Path, tell: Tell) -> None:
    while True:
        with ChunkStore(path) as store:
            tell("ready")
            if damaged := store.verify().damaged:
                tell("wrong", f"verify found damage: {damaged}")
            store.rebuild_index()


def _evict(corpus: Corpus, path: Path, options: dict[str, Any], rng: random.Random, tell: Tell) -> None:
    with corpus.engine(path, host_budget=0, **options) as engine:
        tell("ready")
        while True:
            engine.precompute([rng.choice(corpus.prompts).document])


# -- what must be true afterwards ---------------------------------------------------------------------------------------


def _examined(outcome: Outcome, examine: Callable[[Tell], None]) -> int:
    worker = Worker(examine)
    code = worker.join(120)
    if code != 0:
        outcome.problems.append(f"the examination ended with {code}: {worker.of_kind('error')}")
        if code is None:
            worker.kill()
    outcome.problems += [text for (text,) in worker.of_kind("wrong")]
    return sum(count for (count,) in worker.of_kind("found"))


def _examine(corpus: Corpus, path: Path, book: _Book, options: dict[str, Any], tell: Tell) -> None:
    started = time.time()
    store = ChunkStore(path, host_budget=0, **options)
    old = [p.name for p in (path / "tmp").glob("*.*") if p.name != "gate.lock" and p.stat().st_mtime < started]
    if old:
        tell("wrong", f"left in tmp: {old}")
    stats = store.stats()
    report = store.verify()
    # What the opening left to mend: nothing.
    if (report.damaged, report.adopted, report.dropped, report.temp_files) != ((), 0, 0, 0):
        tell("wrong", f"verify after opening: {report}")
    if stats.disk.bytes != bytes_below(path / "chunks"):
        tell("wrong", f"the index counts {stats.disk.bytes} bytes of {bytes_below(path / 'chunks')}")
    budget = options.get("disk_budget")
    if budget and stats.disk.bytes > budget + LARGEST_CHUNK:
        tell("wrong", f"{stats.disk.bytes} bytes in a budget of {budget}")
    found = _samples_found(store, book, tell)
    held = {info.id: info for info in store.documents()}
    for number in book.documents:
        info = held.get(corpus.prompts[number].document.id)
        if info is None or info.stored != 3:
            tell("wrong", f"document {number} was stored and is {info}")
        found += 3
    tell("found", found)
    with corpus.engine(store) as engine:
        for number in random.sample(range(len(corpus.prompts)), min(3, len(corpus.prompts))):
            if wrong := corpus.ask(engine, number):
                tell("wrong", wrong)
    store.close()


def _samples_found(store: ChunkStore, book: _Book, tell: Tell) -> int:
    by_text = {text: (key, tokens) for key, text, tokens in store.texts()}
    found = 0
    for number in book.samples:
        key, tokens = by_text.get(f"sample {number}", (None, 0))
        reader = None if key is None else store.open(key)
        if reader is None:
            tell("wrong", f"sample {number} was stored and is gone")
            continue
        with reader:
            if not sample(number, tokens=tokens).matches(reader):
                tell("wrong", f"sample {number} has wrong rows")
        found += 1
    return found
