"""Faults: the disk refuses, lies, is slow, full or gone, under the whole engine. No answer is wrong, none is waited for for ever.

Whatever happens, a request is answered as a fresh engine would that misses what the report says was missed, and the report
says why. A job that can't go on says so, and what was stored before stays.
"""

from __future__ import annotations

import random
import shutil
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "store"))

from broken_off import CHANGES, failed_at_every_step
from faulty_disk import READS, WRITES, Fault, faulty_disk
from soak_common import Corpus, Outcome

from cachetune_rag import CacheTune
from cachetune_store import StoreError, StoreFullError

READ_TIMEOUT = 0.3
LONGEST = 20.0
"""Seconds after which a request counts as hung; it should take a fraction of one."""
READ_ERRORS = ("EIO", "EACCES", "ESTALE", "ENOMEM")
STEP_ERRORS = ("EIO", "ENOSPC", "EACCES")
"""Errors of which each in turn is met by the next step of a change of the store."""
WRITE_ERRORS = ("ENOSPC", "EDQUOT", "EROFS", "EACCES", "EIO")


def run(folder: Path, *, rounds: int = 1, most: int | None = None, corpus: Corpus | None = None) -> Outcome:
    """Every fault, `rounds` times with other random choices; at most `most` faults, chosen at random."""
    started = time.perf_counter()
    outcome = Outcome("faults")
    bench = _Bench(folder, corpus or Corpus(prompts=2), outcome)
    trials = [trial for seed in range(rounds) for trial in _trials(bench, seed)]
    if most is not None:
        trials = [trials[-1], *random.Random(most).sample(trials[:-1], most - 1)]
    for trial in trials:
        trial()
    # The short form has steps in tests/store/test_store_broken_off.py.
    for name, change in CHANGES.items() if most is None else ():
        for first, kind in enumerate(STEP_ERRORS):
            problems = failed_at_every_step(folder / "steps", change, kind, every=len(STEP_ERRORS), first=first)
            outcome.problems += [f"{name}: {problem}" for problem in problems]
    outcome.figures |= {"trials": len(trials), **bench.figures}
    outcome.seconds = time.perf_counter() - started
    return outcome


def _trials(bench: _Bench, seed: int) -> list[Callable[[], None]]:
    trials: list[Callable[[], None]] = []
    trials += [partial(bench.answer_under, fault) for fault in _reading_faults(seed)]
    trials += [partial(bench.answer_under, fault, missing=True) for fault in _writing_faults(seed)]
    for kind in WRITE_ERRORS:
        trials.append(partial(bench.index_under, Fault(kind, WRITES, after=3 + 9 * seed, seed=seed)))
        trials.append(partial(bench.index_under, Fault(kind, ("write",), after=1 + 2 * seed, seed=seed)))
        trials.append(partial(bench.remove_under, Fault(kind, WRITES, chance=0.5, seed=seed)))
    for kind in (*READ_ERRORS, "EROFS"):
        trials.append(partial(bench.open_under, Fault(kind, (*READS, *WRITES), chance=0.3, seed=seed)))
    return [*trials, partial(bench.disk_that_is_gone, seed)]


def _reading_faults(seed: int) -> list[Fault]:
    faults = [Fault(kind, READS, chance, seed=seed) for kind in READ_ERRORS for chance in (1.0, 0.3)]
    faults += [Fault(kind, ("preadv",), chance, seed=seed) for kind in ("garbage", "cut") for chance in (1.0, 0.2)]
    faults += [Fault("short", ("preadv",), seed=seed)]
    faults += [Fault("EIO", ("preadv",), after=2 + seed, count=1, seed=seed)]
    faults += [Fault("slow", READS, 0.3, seconds=2 * READ_TIMEOUT, seed=seed)]
    return [*faults, Fault("stuck", READS, after=seed), Fault("stuck", ("preadv",), after=4 + seed)]


def _writing_faults(seed: int) -> list[Fault]:
    faults = [Fault(kind, WRITES, chance, seed=seed) for kind in WRITE_ERRORS for chance in (1.0, 0.3)]
    faults += [Fault("slow", ("fsync",), 0.7, seconds=2 * READ_TIMEOUT, seed=seed)]
    return [*faults, Fault("stuck", ("fsync",), after=seed), Fault("stuck", ("write",), after=seed)]


class _Bench:
    """A store to break, and what to do with it meanwhile."""

    def __init__(self, folder: Path, corpus: Corpus, outcome: Outcome):
        self._folder, self._corpus, self._outcome = folder, corpus, outcome
        self._documents = [prompt.document for prompt in corpus.prompts]
        self.figures: dict[str, Any] = {"requests": 0, "faults met": 0, "slowest request (s)": 0.0}
        self.figures |= {"unreadable": 0, "damaged": 0, "timed out": 0, "unstored": 0, "jobs stopped": 0}
        with corpus.engine(folder / "whole") as engine:
            engine.precompute(self._documents)

    def answer_under(self, fault: Fault, *, missing: bool = False) -> None:
        """Ask while reads fail; or, with chunks `missing`, while writes do."""
        name = f"{fault.kind} of {'/'.join(fault.calls)} (chance {fault.chance:g}, after {fault.after})"
        path = self._copy(missing=missing)
        options = {"host_budget": 0, "read_timeout": READ_TIMEOUT}
        with self._corpus.engine(path, **options) as engine:
            with faulty_disk(path, fault):
                for number in range(len(self._corpus.prompts)):
                    self._ask(name, engine, number, fault)
            self._settled(engine)
            # The disk is well again: so is everything else.
            for _ in range(2):
                for number in range(len(self._corpus.prompts)):
                    self._ask(f"after {name}", engine, number, None)
            self._whole(f"after {name}", engine)
        self.figures["faults met"] += fault.met

    def index_under(self, fault: Fault) -> None:
        """Precompute while writes fail: a clear stop, earlier chunks good, and the rest when the disk is well again."""
        name = f"precompute with {fault.kind} of {'/'.join(fault.calls)} after {fault.after}"
        path = self._folder / "index"
        shutil.rmtree(path, ignore_errors=True)
        with self._corpus.engine(path, host_budget=0) as engine:
            stopped: Exception | None = None
            with faulty_disk(path, fault):
                try:
                    engine.precompute(self._documents)
                except Exception as error:
                    stopped = error
            self._clear(name, stopped)
            full = fault.kind in ("ENOSPC", "EDQUOT")
            if stopped is not None:
                self.figures["jobs stopped"] += 1
                self._outcome.expect(not full or isinstance(stopped, StoreFullError), f"{name}: {stopped!r}")
            stored = engine.store.stats().disk.chunks
            report = engine.store.verify()
            line = (report.damaged, report.adopted, report.checked)
            self._outcome.expect(line == ((), 0, stored), f"{name}: {stored} stored, then {report}")
            left = [p.name for p in (path / "tmp").glob("*.tmp")]
            self._outcome.expect(not left, f"{name}: left {left}")
            summary = engine.precompute(self._documents)
            self._outcome.expect(summary.skipped == stored, f"{name}: {summary.skipped} skipped of {stored} stored")
            self._whole(name, engine)
        self.figures["faults met"] += fault.met

    def remove_under(self, fault: Fault) -> None:
        """Delete documents while writes fail: each is gone, or still there and can be deleted later."""
        name = f"remove with {fault.kind}"
        path = self._copy()
        with self._corpus.engine(path, host_budget=0) as engine:
            with faulty_disk(path, fault):
                for document in self._documents:
                    try:
                        engine.remove(document.id)
                    except Exception as error:
                        self._clear(name, error)
            for document in self._documents:
                engine.remove(document.id, missing_ok=True)
            report = engine.store.verify()
            left = engine.store.documents(), list(engine.store.texts())
            self._outcome.expect(left == ([], []), f"{name}: left {left}")
            self._outcome.expect(report.ok and report.documents == 0, f"{name}: {report}")
        self.figures["faults met"] += fault.met

    def open_under(self, fault: Fault) -> None:
        """Open the store while everything fails now and then: it opens, or an error of the store says why not."""
        path = self._copy()
        with faulty_disk(path, fault):
            try:
                engine = self._corpus.engine(path, host_budget=0, read_timeout=READ_TIMEOUT)
            except Exception as error:
                self._clear(f"open with {fault.kind}", error)
            else:
                engine.close()
        with self._corpus.engine(path, host_budget=0) as engine:
            self._whole(f"opened after {fault.kind}", engine)
        self.figures["faults met"] += fault.met

    def disk_that_is_gone(self, seed: int) -> None:
        """A disk that answers nothing any more costs one wait, not one a request, and no threads."""
        path = self._copy()
        with self._corpus.engine(path, host_budget="1GiB", read_timeout=READ_TIMEOUT) as engine:
            prompt = self._corpus.prompts[0]
            for _ in range(2):  # the second one waits until the chunks are in host memory
                engine.prefill(query=prompt.query, chunks=prompt.chunks)
            fault = Fault("stuck", (*READS, *WRITES), after=seed)
            with faulty_disk(path, fault):
                self._ask("disk gone", engine, 1, fault)
                threads = threading.active_count()
                started = time.perf_counter()
                for _ in range(20):
                    for number in range(len(self._corpus.prompts)):
                        self._ask("disk gone", engine, number, fault)
                took = time.perf_counter() - started
                report = engine.prefill(query=prompt.query, chunks=prompt.chunks).report
                held = prompt.missing(report.missed) == frozenset()
                self._outcome.expect(held, f"disk gone: chunks in host memory were not used: {report}")
                more = threading.active_count() - threads
                self._outcome.expect(more <= 4, f"disk gone: {more} more threads after 40 requests")
                self.figures["40 requests without a disk (s)"] = round(took, 2)
            self._settled(engine)
            self._whole("after the disk was gone", engine)

    def _ask(self, name: str, engine: CacheTune, number: int, fault: Fault | None) -> None:
        reports: list[Any] = []
        engine_prefill = engine.prefill

        def prefill(*args: Any, **kwargs: Any) -> Any:
            state = engine_prefill(*args, **kwargs)
            reports.append(state.report)
            return state

        engine.prefill = prefill  # type: ignore[method-assign]
        started = time.perf_counter()
        wrong = _within(LONGEST, lambda: self._corpus.ask(engine, number))
        engine.prefill = engine_prefill  # type: ignore[method-assign]
        took = time.perf_counter() - started
        self.figures["requests"] += 1
        self.figures["slowest request (s)"] = max(self.figures["slowest request (s)"], round(took, 2))
        self._outcome.expect(wrong is None, f"{name}: {wrong}")
        for report in reports:
            for field in ("unreadable", "damaged", "timed_out", "unstored"):
                self.figures[field.replace("_", " ")] += getattr(report, field)
            # A chunk that is there and wasn't had has a reason.
            told = report.unreadable + report.damaged + report.timed_out
            explained = told or not report.missed or fault is None or fault.calls[0] not in READS
            self._outcome.expect(explained, f"{name}: missed {report.missed} tokens, and no word why: {report}")

    def _whole(self, name: str, engine: CacheTune) -> None:
        """Everything is stored, sound and in line."""
        engine.precompute(self._documents)
        report = engine.store.verify()
        line = (report.damaged, report.adopted, report.dropped, report.temp_files)
        self._outcome.expect(line == ((), 0, 0, 0), f"{name}: {report}")
        for number, prompt in enumerate(self._corpus.prompts):
            self._ask(name, engine, number, None)
            missed = engine.prefill(query=prompt.query, chunks=prompt.chunks).report.missed
            self._outcome.expect(missed == 0, f"{name}: prompt {number} still misses {missed} tokens")
        pinned = engine.store.stats().disk.pinned
        self._outcome.expect(pinned == 0, f"{name}: {pinned} chunks are still pinned")

    def _clear(self, name: str, error: Exception | None) -> None:
        """An error is one of the store's own, which names the path."""
        if error is not None:
            clear = isinstance(error, StoreError) and str(self._folder) in str(error)
            self._outcome.expect(clear, f"{name}: not a clear error: {error!r}")

    def _settled(self, engine: CacheTune) -> None:
        """Wait until what was left behind has come back."""
        until = time.monotonic() + LONGEST
        while engine.runtime.pool.overdue and time.monotonic() < until:
            time.sleep(0.01)
        self._outcome.expect(not engine.runtime.pool.overdue, "calls that were left behind never came back")

    def _copy(self, *, missing: bool = False) -> Path:
        path = self._folder / "copy"
        shutil.rmtree(path, ignore_errors=True)
        if not missing:
            shutil.copytree(self._folder / "whole", path)
        return path


def _within(seconds: float, work: Callable[[], str | None]) -> str | None:
    """What the work says; "hung" if it doesn't end."""
    said: list[str | None] = []

    def go() -> None:
        try:
            said.append(work())
        except Exception as error:
            said.append(f"raised {error!r}")

    thread = threading.Thread(target=go, daemon=True)
    thread.start()
    thread.join(seconds)
    return said[0] if said else f"hung for {seconds:g} s"
