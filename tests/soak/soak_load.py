"""Load: processes with several threads precompute, answer and delete on one store whose budget is a tenth of the data.

Everything is evicted all the time, mostly by somebody else. No answer may be wrong, no thread may hang or meet an error, the
budget may never be exceeded by more than a chunk, and hardly a chunk may be computed while it is stored, or stored by another
while it is computed.
"""

from __future__ import annotations

import random
import shutil
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from soak_common import Corpus, Outcome, Worker, bytes_below

from cachetune_rag import CacheTune
from cachetune_store import ChunkStore

GRACE = 60.0
"""Seconds that a worker may need to finish what it is at."""
LEAST_ACTIONS = 4
"""What each thread does however long it takes: on a busy machine the processes may begin when the time is up."""
Tell = Callable[..., None]


def run(
    folder: Path, *, seconds: float, processes: int, threads: int, share: float = 0.1, corpus: Corpus | None = None
) -> Outcome:
    """Load a store for so long; its budget is `share` of the corpus's data."""
    started = time.perf_counter()
    outcome = Outcome("load")
    corpus = corpus or Corpus(prompts=40, length=30)
    path = folder / "store"
    total, largest = _measure(corpus, folder / "measure")
    budget = max(int(total * share), 4 * largest)
    until = time.monotonic() + seconds
    workers = [
        Worker(lambda tell, seed=seed: _work(corpus, path, budget, threads, until, seed, tell))  # type: ignore[misc]
        for seed in range(processes)
    ]
    watch = _Watch(path, budget)
    watch.start()
    for number, worker in enumerate(workers):
        code = worker.join(until - time.monotonic() + GRACE)
        if code is None:
            outcome.problems.append(f"process {number} hung: {worker.messages}")
            worker.kill()
        else:
            outcome.expect(code == 0, f"process {number} ended with {code}: {worker.of_kind('error')}")
        outcome.problems += [f"process {number}: {text}" for (text,) in worker.of_kind("wrong")]
    watch.end()
    counts: Counter[str] = Counter()
    for worker in workers:
        for (found,) in worker.of_kind("counts"):
            counts.update(found)
    _judge(outcome, counts, watch, budget, largest)
    with ChunkStore(path, disk_budget=budget) as store:
        report = store.verify()
        line = (report.damaged, report.adopted, report.dropped, report.temp_files)
        outcome.expect(line == ((), 0, 0, 0), f"afterwards: {report}")
        outcome.expect(store.stats().disk.bytes == bytes_below(path / "chunks"), "the index counts other bytes")
    outcome.figures |= {"processes": processes, "threads each": threads, "data": total, "budget": budget, **counts}
    outcome.figures["fullest over budget (bytes)"] = watch.fullest - budget
    outcome.seconds = time.perf_counter() - started
    return outcome


def _judge(outcome: Outcome, counts: Counter[str], watch: _Watch, budget: int, largest: int) -> None:
    outcome.expect(watch.fullest <= budget + largest, f"{watch.fullest} bytes in a budget of {budget}")
    outcome.expect(watch.looks > 0, "the budget was never looked at")
    outcome.expect(counts["answers"] > 0, "nothing was answered")
    twice = counts["computed while stored"] + counts["stored meanwhile"]
    share = twice / max(1, counts["computed"])
    outcome.figures["double work"] = round(share, 4)
    outcome.expect(share <= 0.01, f"{twice} of {counts['computed']} chunks computed twice")


def _measure(corpus: Corpus, path: Path) -> tuple[int, int]:
    """Bytes of all chunk files, and of the largest."""
    with corpus.engine(path) as engine:
        engine.precompute([prompt.document for prompt in corpus.prompts])
    sizes = [file.stat().st_size for file in path.glob("chunks/*/*")]
    shutil.rmtree(path)
    return sum(sizes), max(sizes)


class _Watch(threading.Thread):
    """Looks how full the store is. Files change inside of the index's transactions only, so one is held meanwhile."""

    def __init__(self, path: Path, budget: int):
        super().__init__(daemon=True)
        self._path, self._budget = path, budget
        self._ending = threading.Event()
        self.fullest = self.looks = 0

    def run(self) -> None:
        with ChunkStore(self._path, disk_budget=self._budget) as store:
            while not self._ending.wait(0.05):
                with store.index.transaction():
                    self.fullest = max(self.fullest, bytes_below(self._path / "chunks"))
                self.looks += 1

    def end(self) -> None:
        self._ending.set()
        self.join(GRACE)


def _work(corpus: Corpus, path: Path, budget: int, threads: int, until: float, seed: int, tell: Tell) -> None:
    # Host memory for a few chunks, so that all three of memory, disk and misses are met.
    with corpus.engine(path, disk_budget=budget, host_budget=budget // 4) as engine:
        counts = _Counts(engine)
        crew = [
            threading.Thread(target=_act, args=(corpus, engine, counts, until, random.Random(f"{seed} {number}"), tell))
            for number in range(threads)
        ]
        for thread in crew:
            thread.start()
        for thread in crew:
            thread.join()
        pinned = engine.store.stats().disk.pinned
        if pinned:
            engine.runtime.prefetcher.close()  # what it took over is closed then
            pinned = engine.store.stats().disk.pinned
        if pinned:
            tell("wrong", f"{pinned} chunks are still pinned")
        stats = engine.store.stats()
        if stats.damaged:
            tell("wrong", f"{stats.damaged} damaged files")
        counts.add("evictions", stats.disk.evictions)
    tell("counts", dict(counts.counts))


def _act(corpus: Corpus, engine: CacheTune, counts: _Counts, until: float, rng: random.Random, tell: Tell) -> None:
    done = 0
    while done < LEAST_ACTIONS or time.monotonic() < until:
        done += 1
        number = rng.randrange(len(corpus.prompts))
        document = corpus.prompts[number].document
        action = rng.random()
        try:
            wrong: str | None = None
            if action < 0.3:
                engine.precompute([document])
                counts.add("documents")
            elif action < 0.4:
                engine.remove(document.id, missing_ok=True)
                counts.add("removed")
            elif action < 0.7:
                wrong = corpus.ask(engine, number)
                counts.add("answers")
            else:
                wrong = corpus.generate(engine, number)
                counts.add("answers")
            if wrong:
                tell("wrong", wrong)
        except Exception:
            tell("wrong", traceback.format_exc())


class _Counts:
    """Counts of one process; knows which chunks are computed though they are stored already."""

    def __init__(self, engine: CacheTune):
        self.counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        compute, store = engine.runtime.chunk_computer.compute, engine.store

        def counted(job: Any, batch: Any) -> Any:
            stored = sum(store.tier("disk").contains(chunk.key) for chunk in batch.chunks)
            encoded = compute(job, batch)
            # Also what another process has stored in the meantime, while this one was at it.
            both = sum(store.tier("disk").contains(chunk.key) for chunk in encoded)
            self.add("computed", len(encoded))
            self.add("computed while stored", stored)
            self.add("stored meanwhile", both - stored)
            return encoded

        engine.runtime.chunk_computer.compute = counted  # type: ignore[method-assign]

    def add(self, what: str, count: int = 1) -> None:
        """Count, from any thread."""
        with self._lock:
            self.counts[what] += count
