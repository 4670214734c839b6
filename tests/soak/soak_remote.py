"""A remote tier that is killed and started again, again and again, while machines precompute, answer, replace and remove.

Two machines with a folder and two processes each, and one process without a folder, share a real server: Valkey, then S3. The server is killed by SIGKILL at random
moments and started again on its data. No answer may be wrong or late, no call may fail but those that have to tell the others at once, and everything
whose telling was reported has to be found by a machine that begins with an empty disk.
"""

from __future__ import annotations

import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from remote_servers import BUCKET, S3Server, Server, ValkeyServer, missing, s3_options
from soak_common import Corpus, Outcome, Worker
from soak_remote_machines import GRACE, Process, Shared, Tell, look

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
        options: dict[str, Any] = {"remote_timeout": REMOTE_TIMEOUT, "read_timeout": READ_TIMEOUT}
        url = f"valkey://127.0.0.1:{self._server.port}/kv"
        if place == "s3":
            url = f"s3://{BUCKET}/kv"
            options["remote_options"] = s3_options(self._server.port)
        self._shared = Shared(corpus, url, options, folder)
        self._sure = 0

    def run(self, kills: int, examine_every: int, up: float) -> None:
        self._server.start()
        try:
            self._wait_for_server()
            room = int(DISK_SHARE * self._measure())
            # Forked before anything of a client is in this process: their threads don't survive a fork.
            workers = [self._started(number, room) for number in range(len(self._machines))]
            for number, worker in enumerate(workers):
                ready = worker.wait_for("ready", GRACE)
                self._outcome.expect(ready, f"{self._place}: process {number} isn't ready: {worker.of_kind('error')}")
            self._shared.begin.touch()
            found = self._kill(kills, examine_every, up, workers)
            self._shared.stop.touch()
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
                self._shared.pause.touch()
            self._server.kill()
            time.sleep(self._rng.random() ** 3 * DOWN_SECONDS)
            self._server.start()
            if self._rng.random() < 0.7:  # otherwise it may be killed while it starts
                self._wait_for_server()
            if looks:
                self._wait_for_server()
                found += self._examine(workers)
        return found

    def _started(self, number: int, room: int) -> Worker:
        machine = self._machines[number]
        disk = None if machine is None else self._folder / machine
        mine = range(number, len(self._corpus.prompts), len(self._machines))
        rng = random.Random(f"{self._rng.random()} {number}")
        return Worker(lambda tell: Process(self._shared, disk, room, mine, rng, tell).run())

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
        examiner = Worker(lambda tell: look(self._shared, tell))
        self._joined("the machine that is new", examiner)
        for worker in workers:
            worker.read()
        self._shared.pause.unlink()
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
