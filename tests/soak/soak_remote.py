"""A remote tier that is killed and started again, again and again, while machines precompute, answer, replace and remove.

Two machines with a folder and two processes each, and one process without a folder, share a real server: Valkey, then S3. The server is killed by SIGKILL at random
moments and started again on its data. No answer may be wrong or late, no call may fail but those that have to tell the others at once, and everything
whose telling was reported has to be found by a machine that begins with an empty disk.
"""

from __future__ import annotations

import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from remote_servers import BUCKET, S3Server, Server, ValkeyServer, missing, s3_options
from soak_common import Corpus, Outcome, Worker

from cachetune_rag import CacheTune, Document
from cachetune_store import StoreError

MACHINES = ("one", "one", "two", "two", None)
"""The folder of each process; None: it has none."""
FEW = ("one", "two", None)
MANY = 10
"""From so many kills on, some requests must have met a server that was gone."""
DISK_SHARE = 0.6
"""Share of the corpus that a folder has room for, so that chunks are read from the server again and again."""
REMOTE_TIMEOUT, READ_TIMEOUT = 1.0, 3.0
LATEST = REMOTE_TIMEOUT + READ_TIMEOUT + 6.0
"""Seconds in which a request has to be answered: what it may wait, and what it takes to compute beside four others on a slow machine."""
UP_SECONDS = 3.0
"""Seconds for which a server runs, at most, before it is killed again."""
DOWN_SECONDS = 1.5
CHANGES = 0.15
"""Share of changes in what a process does."""
GRACE = 120.0
Tell = Callable[..., None]


def run(
    folder: Path,
    *,
    kills: int,
    places: tuple[str, ...] = ("valkey", "s3"),
    examine_every: int = 10,
    up: float = UP_SECONDS,
    machines: tuple[str | None, ...] = MACHINES,
    seed: int = 0,
    corpus: Corpus | None = None,
) -> Outcome:
    """Kill each kind of server so often. Kinds of which the packages are missing are left out, and the figures say so."""
    started = time.perf_counter()
    outcome = Outcome("remote")
    corpus = corpus or Corpus(prompts=10, length=30)
    for place in places:
        if (why := missing(place)) is not None:
            outcome.figures[place] = f"left out: {why}"
            continue
        below = folder / place
        below.mkdir()
        rng = random.Random(f"{seed} {place}")
        _Soak(outcome, corpus, place, below, machines, rng).run(kills, examine_every, up)
    outcome.seconds = time.perf_counter() - started
    return outcome


@dataclass
class _Book:
    """What is known of each document from what its owner has reported.

    Attributes:
        held: the places of its chunks in its prompt, once the others were told of it; empty: it was removed; missing here: a change of it is under way.
        changes: how many changes were begun.
    """

    held: dict[int, list[int]] = field(default_factory=dict)
    changes: Counter[int] = field(default_factory=Counter)

    @classmethod
    def of(cls, workers: list[Worker]) -> _Book:
        book = cls()
        for worker in workers:
            for kind, *rest in worker.messages:
                if kind == "changes":
                    book.held.pop(rest[0], None)
                    book.changes[rest[0]] += 1
                elif kind == "told":
                    book.held[rest[0]] = rest[1]
        return book


class _Soak:
    """One kind of server, and the processes that use it."""

    def __init__(
        self,
        outcome: Outcome,
        corpus: Corpus,
        place: str,
        folder: Path,
        machines: tuple[str | None, ...],
        rng: random.Random,
    ):
        self._outcome, self._corpus, self._place, self._folder, self._rng = outcome, corpus, place, folder, rng
        self._machines = machines
        served = folder / "served"
        served.mkdir()
        self._server: Server = S3Server(served) if place == "s3" else ValkeyServer(served)
        self._remote: dict[str, Any] = {"remote_timeout": REMOTE_TIMEOUT, "read_timeout": READ_TIMEOUT}
        if place == "s3":
            self._url = f"s3://{BUCKET}/kv"
            self._remote["remote_options"] = s3_options(self._server.port)
        else:
            self._url = f"valkey://127.0.0.1:{self._server.port}/kv"
        self._sure = 0
        self._begin, self._pause, self._stop = folder / "begin", folder / "pause", folder / "stop"

    def run(self, kills: int, examine_every: int, up: float) -> None:
        self._server.start()
        try:
            self._wait_for_server()
            room = int(DISK_SHARE * self._measure())
            # Forked before anything of a client is in this process: their threads don't survive a fork.
            workers = [
                Worker(lambda tell, number=number: self._work(number, room, tell))  # type: ignore[misc]
                for number in range(len(self._machines))
            ]
            for number, worker in enumerate(workers):
                ready = worker.wait_for("ready", GRACE)
                self._outcome.expect(ready, f"{self._place}: process {number} isn't ready: {worker.of_kind('error')}")
            self._begin.touch()
            found = self._kill(kills, examine_every, up, workers)
            self._stop.touch()
            for number, worker in enumerate(workers):
                self._joined(f"process {number}", worker)
            self._judge(kills, found, workers)
        finally:
            self._server.kill()

    def _kill(self, kills: int, examine_every: int, up: float, workers: list[Worker]) -> int:
        """Kill the server and start it again, and look at what it has now and then. Returns how many chunks were found."""
        found = 0
        for done in range(1, kills + 1):
            time.sleep(self._rng.random() * up)
            looks = done % examine_every == 0 or done == kills
            if looks:  # what was told before the server died is to be found after that, and not what was told since
                self._pause.touch()
            self._server.kill()
            time.sleep(self._rng.random() ** 3 * DOWN_SECONDS)
            self._server.start()
            if self._rng.random() < 0.7:  # otherwise it may be killed while it starts
                self._wait_for_server()
            if looks:
                self._wait_for_server()
                found += self._examine(workers)
        return found

    def _wait_for_server(self) -> None:
        """Wait in a process of its own, as clients must not be in this one."""

        def ask(_: Tell) -> None:
            while not self._server.answers():
                time.sleep(0.05)

        waiting = Worker(ask)
        if waiting.join(GRACE) != 0:
            waiting.kill()
            raise RuntimeError(f"{self._place} doesn't answer again: {waiting.of_kind('error')}")

    def _measure(self) -> int:
        """Bytes of all chunks."""
        with self._corpus.engine() as engine:
            return engine.precompute([prompt.document for prompt in self._corpus.prompts]).bytes

    # -- what the processes do -----------------------------------------------------------------------------------------

    def _work(self, number: int, room: int, tell: Tell) -> None:
        machine, rng = self._machines[number], random.Random(f"{self._rng.random()} {number}")
        options: dict[str, Any] = {"host_budget": room // 4, **self._remote}
        if machine is not None:
            options |= {"remote": self._url, "disk_budget": room}
        with self._corpus.engine(self._url if machine is None else self._folder / machine, **options) as engine:
            tell("ready")
            while not self._begin.exists():
                time.sleep(0.01)
            mine = range(number, len(self._corpus.prompts), len(self._machines))
            self._act(engine, mine, machine is not None, rng, tell)
            stats = engine.store.stats()
            tell("store", stats.damaged, stats.remote.failed, stats.remote.hits, stats.remote.bytes_read)

    def _act(self, engine: CacheTune, mine: range, behind: bool, rng: random.Random, tell: Tell) -> None:
        counts: Counter[str] = Counter()
        slowest = 0.0
        untold: dict[int, list[int]] = {}
        while not self._stop.exists():
            try:
                paused = self._pause.exists()
                if untold and (paused or rng.random() < 0.3):
                    counts["changes told later"] += self._tell_again(engine, untold, behind, tell)
                if mine and not paused and rng.random() < CHANGES:
                    number = rng.choice(mine)
                    held = [place for place in range(3) if rng.random() < 0.8]
                    tell("changes", number)
                    untold[number] = held
                    if self._change(engine, number, held, behind):
                        tell("told", number, untold.pop(number))
                        counts["changes told at once"] += 1
                    continue
                begun = time.monotonic()
                ask = rng.choice((self._corpus.ask, self._corpus.generate))
                if wrong := ask(engine, rng.randrange(len(self._corpus.prompts))):
                    tell("wrong", wrong)
                counts["answers"] += 1
                slowest = max(slowest, time.monotonic() - begun)
            except Exception:
                tell("wrong", traceback.format_exc())
        tell("counts", dict(counts), slowest)

    def _change(self, engine: CacheTune, number: int, held: list[int], behind: bool) -> bool:
        """Store, replace or remove a document of this process. Returns whether the others were told of it."""
        document = self._corpus.prompts[number].document
        try:
            if held:
                engine.precompute([Document(document.id, [document.chunks[place] for place in held])])
            else:
                engine.remove(document.id, missing_ok=True)
        except StoreError:
            if behind:  # the folder takes it, whatever the server does
                raise
            return False
        return self._synced(engine)

    def _tell_again(self, engine: CacheTune, untold: dict[int, list[int]], behind: bool, tell: Tell) -> int:
        """Tell what the others could not be told. Returns how many changes that were.

        A folder has kept them, so nothing is stored again; without one, an error has said that they were not made.
        """
        told = 0
        synced = behind and self._synced(engine)
        for number, held in list(untold.items()):
            if synced or (not behind and self._change(engine, number, held, behind)):
                tell("told", number, held)
                del untold[number]
                told += 1
        return told

    def _synced(self, engine: CacheTune) -> bool:
        try:
            engine.store.sync()
        except StoreError:
            return False
        return True

    # -- what must be true ---------------------------------------------------------------------------------------------

    def _examine(self, workers: list[Worker]) -> int:
        """Look with a machine that has nothing of its own, while no document changes. Returns how many chunks it was to find."""
        before = _Book()
        until = time.monotonic() + GRACE
        while time.monotonic() < until:  # until everything is told that could not be told while the server was gone
            for worker in workers:
                worker.read()
            before = _Book.of(workers)
            if before.changes.keys() <= before.held.keys():
                break
            time.sleep(0.05)
        else:
            untold = before.changes.keys() - before.held.keys()
            self._outcome.problems.append(f"{self._place}: the others are not told of documents {sorted(untold)}")
        examiner = Worker(self._look)
        self._joined("the machine that is new", examiner)
        for worker in workers:
            worker.read()
        self._pause.unlink()
        after = _Book.of(workers)
        sure = [number for number in before.held if before.changes[number] == after.changes[number]]
        for looked in examiner.of_kind("found"):
            found = {int(number): places for number, places in looked[0].items()}
            for number in sure:
                said = before.held[number]
                self._outcome.expect(
                    found[number] == said,
                    f"{self._place}: document {number} was told with chunks {said}, and a new machine finds {found[number]}",
                )
        self._sure += len(sure)
        return sum(len(before.held[number]) for number in sure)

    def _look(self, tell: Tell) -> None:
        """What a machine with nothing of its own finds: which chunks of each document it can read whole, and that answers are right."""
        with self._corpus.engine(self._url, host_budget=0, **self._remote) as engine:
            until = time.monotonic() + GRACE
            while True:  # a server that has just started may answer with errors for a while
                try:
                    engine.store.sync()
                    break
                except StoreError:
                    if time.monotonic() > until:
                        raise
            documents = {info.id: info.chunks for info in engine.documents()}
            found: dict[int, Any] = {}
            for number, prompt in enumerate(self._corpus.prompts):
                keys = documents.get(prompt.document.id, ())
                ids = [engine.runtime.assembler.key(engine.prompts.encode(text)) for text in prompt.chunks]
                found[number] = [ids.index(key) for key in keys if self._is_readable(engine, key)]
                if wrong := self._corpus.ask(engine, number):
                    tell("wrong", f"a new machine: {wrong}")
            stats = engine.store.stats()
            tell("store", stats.damaged, 0, 0, 0)
            tell("found", found)

    def _is_readable(self, engine: CacheTune, key: Any) -> bool:
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

    def _joined(self, name: str, worker: Worker) -> None:
        code = worker.join(GRACE)
        if code is None:
            self._outcome.problems.append(f"{self._place}: {name} hung: {worker.messages[-3:]}")
            worker.kill()
        else:
            self._outcome.expect(code == 0, f"{self._place}: {name} ended with {code}: {worker.of_kind('error')}")
        self._outcome.problems += [f"{self._place}: {name}: {text}" for (text,) in worker.of_kind("wrong")]

    def _judge(self, kills: int, found: int, workers: list[Worker]) -> None:
        counts: Counter[str] = Counter(
            {"kills": kills, "documents looked for": self._sure, "chunks found again": found}
        )
        slowest = 0.0
        for worker in workers:
            for done, longest in worker.of_kind("counts"):
                counts.update(done)
                slowest = max(slowest, longest)
            for damaged, failed, hits, size in worker.of_kind("store"):
                counts.update({"damaged": damaged, "requests failed": failed, "chunks read": hits, "bytes read": size})
        self._outcome.expect(slowest <= LATEST, f"{self._place}: an answer took {slowest:.1f} s")
        self._outcome.expect(counts["damaged"] == 0, f"{self._place}: {counts['damaged']} chunks were called damaged")
        # A server that is back at once may not have been missed.
        noticed = counts["requests failed"] > 0 or kills < MANY
        self._outcome.expect(noticed, f"{self._place}: no process noticed that the server was gone")
        for what in ("answers", "changes told at once", "chunks read", "documents looked for"):
            self._outcome.expect(counts[what], f"{self._place}: {what}: none")
        self._outcome.figures[self._place] = {**counts, "slowest answer (s)": round(slowest, 2)}
