"""Planted files: pipes, links, devices, folders and files without end in the place of a store's own.

Each round plants some in a copy of a store, before it is opened or while it is in use, asks every prompt in a process of its own
with bounded memory, and expects what a fresh engine answers, in time; then a store that is whole.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from soak_common import Corpus, Outcome, Worker

SECONDS = 60.0
"""A round that takes longer hangs."""
MEMORY = 8 << 30
"""Bytes of address space of a round's process."""


def _pipe(place: Path) -> None:
    os.mkfifo(place)


def _device(place: Path) -> None:
    place.symlink_to("/dev/zero")


def _link(place: Path) -> None:
    place.symlink_to("/etc/passwd")


def _folder(place: Path) -> None:
    (place / "below").mkdir(parents=True)


def _endless(place: Path) -> None:
    with place.open("wb") as file:
        file.truncate(100 << 30)


def _brackets(place: Path) -> None:
    place.write_text("[" * 200_000)


KINDS = (_pipe, _device, _link, _folder, _endless, _brackets)
PLACES = (
    "chunk",
    "document",
    "new document",
    "note",
    "store.json",
    "cache.db",
    "cache.db-wal",
    "cache.db-shm",
    "index",
)


def run(folder: Path, *, rounds: int, seed: int = 0, corpus: Corpus | None = None) -> Outcome:
    """Plant at random, `rounds` times."""
    started = time.perf_counter()
    outcome, corpus, rng = Outcome("planted"), corpus or Corpus(prompts=2), random.Random(seed)
    whole, planted, longest = folder / "whole", Counter[str](), 0.0
    with corpus.engine(whole) as engine:
        engine.precompute([prompt.document for prompt in corpus.prompts])
    for number in range(rounds):
        copy = folder / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(whole, copy)
        plants = [(rng.choice(PLACES), rng.choice(KINDS), rng.random()) for _ in range(rng.randrange(1, 4))]
        running, begun = rng.random() < 0.5, time.perf_counter()
        worker = Worker(
            lambda tell, plants=plants, running=running, copy=copy: _play(corpus, copy, plants, running, tell)
        )  # type: ignore[misc]
        status = worker.join(SECONDS)
        what = ", ".join(f"{plant.__name__[1:]} as {place}" for place, plant, _ in plants)
        if status is None:
            worker.kill()
            worker.join(SECONDS)
        found = [message for (message,) in worker.of_kind("error")]
        outcome.expect(status == 0, f"round {number} ({what}, running: {running}): {'; '.join(found) or 'it hangs'}")
        longest = max(longest, time.perf_counter() - begun)
        planted.update(plant.__name__[1:] for _, plant, _ in plants)
    outcome.figures |= {"rounds": rounds, "planted": dict(sorted(planted.items())), "longest round": round(longest, 2)}
    outcome.seconds = time.perf_counter() - started
    return outcome


def _play(
    corpus: Corpus,
    folder: Path,
    plants: list[tuple[str, Callable[[Path], None], float]],
    running: bool,
    tell: Callable[..., None],
) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))

    def plant_all() -> None:
        for place, plant, where in plants:
            _plant(folder, place, plant, where)

    # What can be told from a good one only by reading on is no part of this: soak_damage has it.
    if not running:
        plant_all()
    # A description that is garbage, yet a plain file, is not taken for a new store's.
    garbage = any(place == "store.json" and plant is _brackets for place, plant, _ in plants)
    try:
        engine = corpus.engine(folder, host_budget=0)
    except Exception as error:
        if not garbage or "store.json" not in str(error):
            raise
        return
    with engine:
        if running:
            plant_all()
        for _ in range(2):
            for number in range(len(corpus.prompts)):
                wrong = corpus.ask(engine, number)
                assert wrong is None, wrong
            engine.precompute([prompt.document for prompt in corpus.prompts])
            engine.store.verify()
        report = engine.store.verify()
        assert (report.damaged, report.adopted, report.dropped) == ((), 0, 0), report
        assert {info.id for info in engine.documents()} == {prompt.document.id for prompt in corpus.prompts}
    tell("done")


def _plant(folder: Path, place: str, plant: Callable[[Path], None], where: float) -> None:
    globs = {"chunk": "chunks/*/*.safetensors", "document": "documents/*/*.json", "note": "notes/*/*.json"}
    if place in globs:
        files = sorted(folder.glob(globs[place]))
        if not files:
            return
        target = files[int(where * len(files))]
    elif place == "new document":
        parents = sorted(path for path in (folder / "documents").iterdir() if path.is_dir())
        target = parents[0] / f"{int(where * 1e9):064x}.json"
    elif place == "index":
        target = folder / "index"
        if plant is _folder:
            return
    else:
        target = folder / place if place == "store.json" else folder / "index" / place
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)
    elif os.path.lexists(target):
        target.unlink()
    if target.parent.is_dir():
        plant(target)
