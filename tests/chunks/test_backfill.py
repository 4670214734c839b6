"""What an answer missed is stored behind it: later, without being in the way, and without being lost."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from faulty_disk import WRITES, Fault, faulty_disk
from tiny import llama, tokenizer

from cachetune_rag import CacheTune
from cachetune_rag.chunks import backfill as missed
from cachetune_rag.concurrency.idle import IDLE_SECONDS
from cachetune_rag.concurrency.model_lock import ModelLock

CHUNKS = [
    "The lighthouse was built in 1871 by three brothers from the next valley.",
    "Its lamp burned whale oil until 1902, when paraffin reached the island.",
    "The keeper's log for that winter names eleven ships and one balloon.",
]
TOKENS = sum(map(len, CHUNKS))
LEAD_INS = [[1, 40, 41, 42], [1, 50, 51, 52], [1, 60, 61, 62]]
WAIT = 60


def fresh(store: Any = None, **options: Any) -> CacheTune:
    return CacheTune(llama(), tokenizer(), store, **{"lead_in": LEAD_INS, **options})


@pytest.fixture
def engine() -> Iterator[CacheTune]:
    with fresh() as made:
        yield made


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks wait for an idle model however long it takes."""
    monkeypatch.setattr(missed, "PATIENCE", 1e6)


def ask(engine: CacheTune, chunks: list[str] = CHUNKS, **options: Any) -> Any:
    return engine.generate("Who built it?", chunks, **{"max_new_tokens": 3, **options})


def stored(engine: CacheTune) -> list[bool]:
    return [engine.store.contains(engine.runtime.assembler.key(engine.prompts.encode(text))) for text in CHUNKS]


def test_it_is_stored_by_itself_as_precompute_would_have(engine: CacheTune) -> None:
    answer = ask(engine)
    assert (answer.report.missed, answer.report.storing, answer.report.unstored) == (TOKENS, 3, 0)
    until = time.monotonic() + WAIT
    while engine.stats().storing:
        assert time.monotonic() < until
        time.sleep(0.005)
    assert stored(engine) == [True] * 3
    state = engine.prefill("Who?", CHUNKS, ratio=0, selector="none")
    with fresh() as other:
        other.precompute(CHUNKS)
        # (Not to the last bit: this one computes what the other kept of its first prompt.)
        expected = other.prefill("Who?", CHUNKS, ratio=0, selector="none").logits
        assert torch.allclose(expected, state.logits, atol=1e-5)
    assert not [t for t in threading.enumerate() if t.name == "cachetune-missed"]


@pytest.mark.usefixtures("patient")
def test_nothing_is_stored_before_the_answer_is_out_or_while_another_is_read(engine: CacheTune) -> None:
    with engine.stream("Why?", CHUNKS[:1], max_new_tokens=40) as another:
        next(iter(another))
        ask(engine)
        time.sleep(3 * IDLE_SECONDS)
        assert (engine.stats().storing, stored(engine)) == (3, [False] * 3)
    assert engine.flush(WAIT)
    assert stored(engine) == [True] * 3


@pytest.mark.usefixtures("patient")
def test_a_request_for_a_chunk_that_waits_computes_it_itself(engine: CacheTune) -> None:
    with engine.runtime.model.lock.reserved():
        ask(engine)
        again = ask(engine)
        assert (again.report.missed, again.report.storing, engine.stats().storing) == (TOKENS, 3, 3)
        assert again.text == ask(engine, reuse=False).text
    assert engine.flush(WAIT)
    assert ask(engine).report.missed == 0


def test_prefill_stores_before_it_returns_even_what_was_waiting(engine: CacheTune) -> None:
    with engine.runtime.model.lock.reserved():
        ask(engine, CHUNKS[:2])
        assert engine.prefill("Who?", CHUNKS).report.unstored == 0
        assert stored(engine) == [True] * 3


def test_a_model_that_is_never_idle_is_shared(engine: CacheTune, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(missed, "PATIENCE", 0.0)
    with engine.runtime.model.lock.reserved():
        ask(engine)
        until = time.monotonic() + WAIT
        while engine.stats().storing:
            assert time.monotonic() < until
            time.sleep(0.005)
    assert stored(engine) == [True] * 3


@pytest.mark.usefixtures("patient")
def test_a_request_waits_for_one_forward_at_most(engine: CacheTune, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that comes while a chunk runs behind its first lead-in has the model before it runs behind the next."""
    order: list[str] = []
    answered = threading.Event()
    capture = engine.adapter.capture_behind

    def request() -> None:
        ask(engine, [], reuse=False)
        order.append("request")
        answered.set()

    def captured(*arguments: Any) -> None:
        if not order:
            threading.Thread(target=request).start()
            while not engine.runtime.model.lock.wanted:
                time.sleep(0.001)
        order.append("capture")
        capture(*arguments)

    monkeypatch.setattr(engine.adapter, "capture_behind", captured)
    ask(engine, CHUNKS[:1])
    assert answered.wait(WAIT)
    assert engine.flush(WAIT)
    assert order == ["capture", "request", "capture", "capture"]


def test_close_stores_what_waits(tmp_path: Path) -> None:
    with fresh(tmp_path) as engine:
        ask(engine)
    with fresh(tmp_path) as engine:
        assert ask(engine).report.missed == 0


@pytest.mark.usefixtures("patient")
def test_close_that_is_interrupted_drops_it_and_releases_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = fresh(tmp_path)
    wait, calls = engine.runtime.backfill.wait, []

    def interrupted(timeout: float | None = None) -> bool:
        calls.append(timeout)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return wait(timeout)

    monkeypatch.setattr(engine.runtime.backfill, "wait", interrupted)
    with engine.runtime.model.lock.reserved():
        ask(engine)
        with pytest.raises(KeyboardInterrupt):
            engine.close()
    assert (engine.runtime.backfill.waiting, engine.runtime.backfill.unstored) == (0, 3)
    assert engine.store.closed
    with fresh(tmp_path) as engine:
        assert engine.store.verify().ok
        assert stored(engine) == [False] * 3


def test_dropping_ends_a_chunk_between_two_forwards(engine: CacheTune, monkeypatch: pytest.MonkeyPatch) -> None:
    capture, dropped = engine.adapter.capture_behind, []

    def captured(*arguments: Any) -> None:
        dropped.append(threading.Thread(target=engine.runtime.backfill.queue.drop))
        dropped[-1].start()
        while not engine.runtime.backfill.queue.dropped:
            time.sleep(0.001)
        capture(*arguments)

    monkeypatch.setattr(engine.adapter, "capture_behind", captured)
    ask(engine)
    assert engine.runtime.backfill.wait(WAIT)
    dropped[0].join()
    assert (len(dropped), engine.stats().unstored, stored(engine)) == (1, 3, [False] * 3)
    assert ask(engine).report.unstored == 3, "nothing is taken any more"


def test_a_process_that_does_not_close_ends_cleanly(tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, 'chunks'); import test_backfill; engine = test_backfill.fresh(sys.argv[1]); "
        "context = engine.runtime.model.lock.reserved(); context.__enter__(); print(test_backfill.ask(engine).report.storing)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=WAIT)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "3", "")


def test_errors_reach_no_answer(
    engine: CacheTune, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(engine.adapter, "capture_behind", lambda *_: 1 / 0)
        assert ask(engine).report.storing == 3
        assert engine.flush(WAIT)
    assert "3 chunks of a request could not be stored and will be computed again: ZeroDivisionError" in caplog.text
    assert CHUNKS[0] not in caplog.text
    assert (engine.stats().unstored, engine.stats().storing) == (3, 0)
    ask(engine)
    engine.flush(WAIT)
    assert (engine.stats().unstored, stored(engine)) == (3, [True] * 3)


def test_a_full_disk_is_counted(tmp_path: Path) -> None:
    with fresh(tmp_path) as engine, faulty_disk(tmp_path, Fault("ENOSPC", WRITES)):
        ask(engine)
        engine.flush(WAIT)
        assert engine.stats().unstored == 3
        assert engine.prefill("Who?", CHUNKS[:1]).report.unstored == 1
        assert engine.stats().unstored == 4


def test_too_many_are_left_to_later_requests(engine: CacheTune, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(missed, "WAITING", 2)
    with engine.runtime.model.lock.reserved():
        report = ask(engine).report
        assert (report.storing, report.unstored, engine.stats().unstored) == (2, 1, 1)
    engine.flush(WAIT)
    assert stored(engine) == [True, True, False]
    assert ask(engine).report.storing == 1


def test_a_thread_that_was_kept_from_starting_is_made_up_for(
    engine: CacheTune, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: threading.Thread) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.runtime.backfill.offer(engine.prompts.build(query="?", chunks=CHUNKS), [0])
    ask(engine, CHUNKS[1:])
    assert engine.flush(WAIT)
    assert stored(engine) == [True] * 3


def test_waiting_for_idle_gives_up_in_time() -> None:
    lock = ModelLock()
    assert not lock.wait_idle(1e6, lambda: False, 0.01)
    with lock.reserved():
        assert not lock.wait_idle(0, lambda: False, 0.01)
    assert lock.wait_idle(0, lambda: False, 0.01)
