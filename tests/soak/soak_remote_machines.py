"""What machines do that share a remote tier: they precompute, answer, replace and remove; and what a new one finds there."""

from __future__ import annotations

import random
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soak_common import Corpus

from cachetune_rag import CacheTune, Document
from cachetune_store import StoreError

CHANGES = 0.15
"""Share of changes in what a process does."""
GRACE = 120.0
Tell = Callable[..., None]


@dataclass(frozen=True)
class Shared:
    """What all processes of a soak know.

    Attributes:
        corpus: what they store and ask.
        url: the remote tier.
        options: how it is reached.
        folder: where files say that processes begin, change nothing for a while, or stop.
    """

    corpus: Corpus
    url: str
    options: dict[str, Any]
    folder: Path

    @property
    def begin(self) -> Path:
        return self.folder / "begin"

    @property
    def pause(self) -> Path:
        return self.folder / "pause"

    @property
    def stop(self) -> Path:
        return self.folder / "stop"


class Process:
    """One process of a machine.

    Args:
        shared: what all know.
        disk: the machine's folder; None: it has none.
        room: bytes that the folder may have.
        mine: documents that this process changes, and no other.
        rng: draws what it does.
        tell: reports.
    """

    def __init__(self, shared: Shared, disk: Path | None, room: int, mine: range, rng: random.Random, tell: Tell):
        self._shared, self._corpus, self._disk, self._room = shared, shared.corpus, disk, room
        self._mine, self._rng, self._tell = mine, rng, tell
        self._untold: dict[int, list[int]] = {}

    def run(self) -> None:
        """Until all are to stop."""
        options: dict[str, Any] = {"host_budget": self._room // 4, **self._shared.options}
        if self._disk is not None:
            options |= {"remote": self._shared.url, "disk_budget": self._room}
        with self._corpus.engine(self._disk or self._shared.url, **options) as engine:
            self._tell("ready")
            while not self._shared.begin.exists():
                time.sleep(0.01)
            self._act(engine)
            stats = engine.store.stats()
            self._tell("store", stats.damaged, stats.remote.failed, stats.remote.hits, stats.remote.bytes_read)

    def _act(self, engine: CacheTune) -> None:
        counts: Counter[str] = Counter()
        rng, slowest = self._rng, 0.0
        while not self._shared.stop.exists():
            try:
                paused = self._shared.pause.exists()
                if self._untold and (paused or rng.random() < 0.3):
                    counts["changes told later"] += self._tell_again(engine)
                if self._mine and not paused and rng.random() < CHANGES:
                    number = rng.choice(self._mine)
                    held = [place for place in range(3) if rng.random() < 0.8]
                    self._tell("changes", number)
                    self._untold[number] = held
                    if self._change(engine, number, held):
                        self._tell("told", number, self._untold.pop(number))
                        counts["changes told at once"] += 1
                    continue
                begun = time.monotonic()
                ask = rng.choice((self._corpus.ask, self._corpus.generate))
                if wrong := ask(engine, rng.randrange(len(self._corpus.prompts))):
                    self._tell("wrong", wrong)
                counts["answers"] += 1
                slowest = max(slowest, time.monotonic() - begun)
            except Exception:
                self._tell("wrong", traceback.format_exc())
        self._tell("counts", dict(counts), slowest)

    def _change(self, engine: CacheTune, number: int, held: list[int]) -> bool:
        """Store, replace or remove a document of this process. Returns whether the others were told of it."""
        document = self._corpus.prompts[number].document
        try:
            if held:
                engine.precompute([Document(document.id, [document.chunks[place] for place in held])])
            else:
                engine.remove(document.id, missing_ok=True)
        except StoreError:
            if self._disk is not None:  # the folder takes it, whatever the server does
                raise
            return False
        return _synced(engine)

    def _tell_again(self, engine: CacheTune) -> int:
        """Tell what the others could not be told. Returns how many changes that were.

        A folder has kept them, so nothing is stored again; without one, an error has said that they were not made.
        """
        told = 0
        synced = self._disk is not None and _synced(engine)
        for number, held in list(self._untold.items()):
            if synced or (self._disk is None and self._change(engine, number, held)):
                self._tell("told", number, held)
                del self._untold[number]
                told += 1
        return told


def look(shared: Shared, tell: Tell) -> None:
    """What a machine with nothing of its own finds: which chunks of each document it can read whole, and that answers are right."""
    with shared.corpus.engine(shared.url, host_budget=0, **shared.options) as engine:
        until = time.monotonic() + GRACE
        while not _synced(engine):  # a server that has just started may answer with errors for a while
            if time.monotonic() > until:
                engine.store.sync()
        documents = {info.id: info.chunks for info in engine.documents()}
        found: dict[int, Any] = {}
        for number, prompt in enumerate(shared.corpus.prompts):
            keys = documents.get(prompt.document.id, ())
            ids = [engine.runtime.assembler.key(engine.prompts.encode(text)) for text in prompt.chunks]
            found[number] = [ids.index(key) for key in keys if _is_readable(engine, key)]
            if wrong := shared.corpus.ask(engine, number):
                tell("wrong", f"a new machine: {wrong}")
        tell("store", engine.store.stats().damaged, 0, 0, 0)
        tell("found", found)


def _synced(engine: CacheTune) -> bool:
    try:
        engine.store.sync()
    except StoreError:
        return False
    return True


def _is_readable(engine: CacheTune, key: Any) -> bool:
    """Whether all rows of a chunk can be read. What isn't answered is asked for again, as nothing is killed meanwhile."""
    until = time.monotonic() + GRACE
    while True:
        errors: list[StoreError] = []
        try:
            reader = engine.store.open(key, errors=errors)
            if reader is not None:
                with reader:
                    for layer in range(len(reader.head.layout.layers)):
                        reader.read(layer, reader.head.layout.tokens)
                return True
        except StoreError as error:
            errors.append(error)
        if not errors or time.monotonic() > until:
            return False
        time.sleep(0.1)
