"""A disk that refuses, fails or doesn't answer: the request goes on without it, and its report says why."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from faulty_disk import READS, WRITES, Fault, faulty_disk
from tiny import llama, tokenizer

from cachetune_rag import CacheTune, Document
from cachetune_rag.concurrency.deadline import DeadlinePool, StoreTimeoutError
from cachetune_rag.errors import ConfigError
from cachetune_rag.reuse.lookup import OpenReaders
from cachetune_store import StoreFullError, StoreStats

CHUNKS = [
    "The lighthouse was built in 1871 by three brothers from the next valley.",
    "Its lamp burned whale oil until 1902, when paraffin reached the island.",
]
ASK = {"query": "Who built it?", "chunks": CHUNKS, "ratio": 0.2, "selector": "frequency"}
TOKENS = sum(map(len, CHUNKS))


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[CacheTune]:
    """A store with both chunks, none of them in host memory."""
    options = {"host_budget": 0, "read_timeout": 0.2, "lead_in": "first_token"}
    with CacheTune(llama(), tokenizer(), tmp_path, **options) as made:
        made.precompute(Document("a", CHUNKS))
        yield made


@pytest.fixture(scope="module")
def alone() -> torch.Tensor:
    """Logits of an engine that has nothing stored."""
    with CacheTune(llama(), tokenizer()) as made:
        return made.prefill(**ASK).logits


def come_back(engine: CacheTune) -> None:
    """Wait until nothing that was left behind is under way."""
    until = time.monotonic() + 30
    while engine.runtime.pool.overdue:
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize("calls", [READS, ("preadv",), ("stat",)])
def test_a_disk_that_does_not_answer_costs_one_wait(
    tmp_path: Path, engine: CacheTune, alone: torch.Tensor, calls: tuple[str, ...]
) -> None:
    with faulty_disk(tmp_path / "chunks", Fault("stuck", calls)) as fault:
        for _ in range(3):
            state = engine.prefill(**ASK)
            if fault.met:
                assert (state.report.timed_out, state.report.missed, state.report.unstored) == (2, TOKENS, 0)
                assert "2 chunks not read in time" in str(state.report)
                assert float((state.logits - alone).abs().max()) <= 1e-5
        assert fault.met <= len(CHUNKS), "only the first request asked the disk"
    come_back(engine)
    report = engine.prefill(**ASK).report
    assert (report.timed_out, report.missed) == (0, 0)
    assert engine.store.stats().damaged == 0
    assert engine.store.stats().disk.pinned == 0


def test_rows_that_do_not_arrive_are_computed(tmp_path: Path, engine: CacheTune, alone: torch.Tensor) -> None:
    # The heads are read, and then the disk falls silent in the middle of the layers.
    with faulty_disk(tmp_path, Fault("stuck", ("preadv",), after=4)) as fault:
        state = engine.prefill(**ASK)
        assert fault.met
        assert (state.report.timed_out, state.report.missed) == (2, TOKENS)
        assert float((state.logits - alone).abs().max()) <= 1e-5
    come_back(engine)
    assert engine.prefill(**ASK).report.missed == 0
    assert engine.store.stats().disk.pinned == 0


def test_chunks_in_host_memory_are_used_without_the_disk(tmp_path: Path, engine: CacheTune) -> None:
    with CacheTune(llama(), tokenizer(), tmp_path, read_timeout=0.5, lead_in="first_token") as warm:
        for _ in range(2):  # the second one waits until the chunk is in host memory
            warm.prefill(**{**ASK, "chunks": CHUNKS[:1]})
        with faulty_disk(tmp_path, Fault("stuck", (*READS, *WRITES))):
            for _ in range(2):
                report = warm.prefill(**ASK).report
                assert (report.timed_out, report.missed) == (1, len(CHUNKS[1]))
                assert report.reused > 0
                assert list(report.bytes_read) == ["host"]
        come_back(warm)


def test_an_answer_does_not_wait_for_a_write_that_hangs(tmp_path: Path, engine: CacheTune) -> None:
    engine.remove("a")
    with faulty_disk(tmp_path, Fault("stuck", ("fsync",))):
        report = engine.generate(**ASK, max_new_tokens=2).report
        assert (report.missed, report.storing) == (TOKENS, 2)
        engine.flush()
        assert engine.stats().unstored == 2
    come_back(engine)


@pytest.mark.parametrize("kind", ["EACCES", "EIO", "ESTALE"])
def test_a_file_that_cannot_be_opened_is_computed_and_told(
    tmp_path: Path, engine: CacheTune, alone: torch.Tensor, kind: str
) -> None:
    with faulty_disk(tmp_path / "chunks", Fault(kind, ("open",))):
        state = engine.prefill(**ASK)
    assert (state.report.unreadable, state.report.damaged, state.report.missed) == (2, 0, TOKENS)
    assert "2 chunks unreadable" in str(state.report)
    assert float((state.logits - alone).abs().max()) <= 1e-5
    assert engine.prefill(**ASK).report.missed == 0
    assert engine.store.stats().damaged == 0, "nothing is wrong with the files"


def test_a_read_that_fails_for_once_is_computed_and_told(tmp_path: Path, engine: CacheTune) -> None:
    with faulty_disk(tmp_path, Fault("EIO", ("preadv",), after=3, count=1)):
        report = engine.prefill(**ASK).report
    assert (report.unreadable, report.damaged) == (1, 0)
    assert engine.prefill(**ASK).report.missed == 0


@pytest.mark.parametrize(("kind", "lost"), [("EIO", True), ("ENOMEM", False), ("ESTALE", False)])
def test_a_file_is_set_aside_only_if_the_disk_lost_it(tmp_path: Path, engine: CacheTune, kind: str, lost: bool) -> None:
    """Reads that fail again and again while memory is short, say, are no damage: the chunk is good."""
    with faulty_disk(tmp_path, Fault(kind, ("preadv",))):
        report = engine.prefill(**ASK).report
    assert (report.damaged, report.unreadable, report.missed) == ((2, 0, TOKENS) if lost else (0, 2, TOKENS))
    assert len(list(tmp_path.glob("damaged/*"))) == report.damaged
    assert engine.prefill(**ASK).report.missed == 0


def test_damage_in_a_head_is_told(tmp_path: Path, engine: CacheTune) -> None:
    for file in (tmp_path / "chunks").glob("*/*"):
        content = bytearray(file.read_bytes())
        content[5000] ^= 1
        file.write_bytes(content)
    report = engine.prefill(**ASK).report
    assert (report.damaged, report.unreadable, report.missed) == (2, 0, TOKENS)


def test_short_reads_are_read_on(tmp_path: Path, engine: CacheTune) -> None:
    with faulty_disk(tmp_path, Fault("short", ("preadv",))) as fault:
        assert engine.prefill(**ASK).report.missed == 0
    assert fault.met


@pytest.mark.parametrize("kind", ["ENOSPC", "EROFS", "EACCES"])
def test_what_cannot_be_stored_is_told(tmp_path: Path, engine: CacheTune, kind: str) -> None:
    engine.remove("a")
    with faulty_disk(tmp_path, Fault(kind, WRITES)):
        report = engine.prefill(**ASK).report
        assert report.unstored == 2
        assert "2 chunks not stored" in str(report)
        with pytest.raises(StoreFullError if kind == "ENOSPC" else Exception, match=str(tmp_path)):
            engine.precompute(Document("a", CHUNKS))
    assert engine.prefill(**ASK).report.unstored == 0
    assert engine.prefill(**ASK).report.missed == 0


def test_a_full_disk_stops_the_job_and_it_resumes(tmp_path: Path, engine: CacheTune) -> None:
    texts = [f"{number}: " + CHUNKS[0] for number in range(6)]
    with faulty_disk(tmp_path, Fault("ENOSPC", ("write",), after=6)), pytest.raises(StoreFullError, match="free space"):
        engine.precompute([Document(text, [text]) for text in texts])
    stored = engine.store.stats().disk.chunks - len(CHUNKS)
    assert 0 < stored < len(texts)
    assert engine.store.verify().ok
    assert list((tmp_path / "tmp").glob("*.tmp")) == []
    again = engine.precompute([Document(text, [text]) for text in texts])
    assert (again.skipped, again.chunks) == (stored, len(texts) - stored)


def test_plain_prompts_are_answered_without_the_disk(tmp_path: Path, engine: CacheTune) -> None:
    text = f"{CHUNKS[0]}\n\nWho?"
    assert engine.prefill(prompt=engine.prompt_from_text(text)).report.recognised == 1
    with faulty_disk(tmp_path, Fault("stuck", READS)):
        engine.prefill(**ASK)
        report = engine.prefill(prompt=engine.prompt_from_text(text)).report
        assert (report.recognised, report.timed_out) == (1, 1), "known from before"
    come_back(engine)


def test_a_reader_keeps_its_file_while_it_is_read(tmp_path: Path, engine: CacheTune) -> None:
    key = engine.runtime.assembler.key(engine.prompts.encode(CHUNKS[0]))
    reader = engine.store.open(key)
    assert reader is not None
    rows: list[torch.Tensor] = []
    with faulty_disk(tmp_path, Fault("stuck", ("preadv",))) as fault:
        thread = threading.Thread(target=lambda: rows.append(reader.read(0, reader.layout.tokens)))
        thread.start()
        while not fault.met:
            time.sleep(0.001)
        reader.close()
    thread.join()
    with engine.store.open(key) as again:
        assert torch.equal(rows[0], again.read(0, reader.layout.tokens))


def test_a_reader_that_is_opened_too_late_is_closed(engine: CacheTune) -> None:
    readers = OpenReaders()
    readers.close()
    readers.close_later(engine.store.open(engine.runtime.assembler.key(engine.prompts.encode(CHUNKS[0]))))
    assert engine.store.stats().disk.pinned == 0


def test_stats_do_not_wait_for_a_disk_that_hangs(engine: CacheTune, monkeypatch: pytest.MonkeyPatch) -> None:
    known = engine.stats()
    assert (known.store_age, known.store.documents) == (0.0, 1)
    stop, asked, real = threading.Event(), [], engine.store.stats

    def hangs() -> StoreStats:
        asked.append(threading.current_thread().name)
        assert stop.wait(30)
        return real()

    monkeypatch.setattr(engine.store, "stats", hangs)
    for _ in range(3):
        stats = engine.stats()
        assert stats.store_age > 0
        assert stats.store == known.store
    assert len(asked) == 1, "no other is begun while one is under way"
    assert not engine.runtime.pool.overdue
    assert engine.prefill(**ASK).report.missed == 0, "requests go on as before"
    assert engine.stats().requests == known.requests + 1
    registry = pytest.importorskip("prometheus_client").CollectorRegistry()
    from cachetune_rag.telemetry.prometheus import CacheTuneCollector

    registry.register(CacheTuneCollector(engine))
    assert registry.get_sample_value("cachetune_store_age_seconds") > 0
    assert registry.get_sample_value("cachetune_documents") == 1
    stop.set()
    pending = engine.runtime.store_stats.pending
    assert pending is not None
    pending.result(30)
    monkeypatch.undo()
    assert engine.stats().store_age == 0


def test_stats_without_an_index_to_be_read_are_the_last_known(tmp_path: Path, engine: CacheTune) -> None:
    engine.stats()
    with faulty_disk(tmp_path, Fault("stuck", READS)):
        engine.prefill(**ASK)
        assert engine.runtime.pool.overdue
        assert engine.stats().store_age > 0
    come_back(engine)
    assert engine.stats().store_age == 0


# -- the deadline itself -----------------------------------------------------------------------------------------------


def test_a_call_that_overruns_keeps_others_from_being_made() -> None:
    stop = threading.Event()
    with closing(DeadlinePool(0.05)) as pool:
        assert pool.call(lambda: 1) == 1
        with pytest.raises(StoreTimeoutError, match=r"within 0\.05 s"):
            pool.call(stop.wait)
        assert pool.overdue
        with pytest.raises(StoreTimeoutError, match="earlier call"):
            pool.call(lambda: 1)
        stop.set()
        while pool.overdue:
            time.sleep(0.001)
        assert pool.call(lambda: 2) == 2


def test_closing_does_not_wait_for_what_was_begun_apart() -> None:
    stop = threading.Event()
    pool = DeadlinePool(30)
    begun = pool.start_apart(stop.wait)
    pool.close()
    assert not pool.overdue
    stop.set()
    assert begun.result(30)


def test_errors_of_a_call_come_through() -> None:
    def fail() -> None:
        raise TimeoutError("its own")

    with closing(DeadlinePool(5)) as pool:
        with pytest.raises(TimeoutError, match="its own"):
            pool.call(fail)
        assert not pool.overdue


def test_calls_inside_of_calls_take_no_other_thread() -> None:
    with closing(DeadlinePool(5)) as pool:
        depth = 12

        def nested(left: int) -> int:
            return threading.get_ident() if not left else pool.call(nested, left - 1)

        assert pool.call(nested, depth) != threading.get_ident()


def test_without_a_deadline_calls_are_made_directly() -> None:
    with closing(DeadlinePool(None)) as pool:
        assert pool.call(threading.get_ident) == threading.get_ident()


@pytest.mark.parametrize("seconds", [0, -1, "5"])
def test_a_deadline_that_makes_no_sense_is_refused(seconds: object) -> None:
    with pytest.raises(ConfigError, match="read_timeout"):
        DeadlinePool(seconds)  # type: ignore[arg-type]


def test_chunks_on_disk_are_opened_side_by_side(engine: CacheTune, monkeypatch: pytest.MonkeyPatch) -> None:
    both, open_one = threading.Barrier(len(CHUNKS), timeout=10), engine.store.open

    def opened(*args: object, **kwargs: object) -> object:
        both.wait()  # raises if the others are not opened meanwhile
        return open_one(*args, **kwargs)

    engine.runtime.pool.seconds = 30
    monkeypatch.setattr(engine.store, "open", opened)
    assert engine.prefill(**ASK).report.missed == 0
