"""Closing an engine whose disk doesn't answer returns in time, and ends when the disk answers. An engine is also used from its own calls."""

from __future__ import annotations

import copy
import pickle
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from faulty_disk import Fault, faulty_disk
from tiny import llama, tokenizer

from cachetune_rag import CacheTune, CacheTuneError, ConfigError, Document, EngineClosedError
from cachetune_rag.telemetry import RequestObserver
from cachetune_store import ChunkStore

CHUNKS = [f"Passage {i}: the lighthouse was built in 187{i} by three brothers." for i in range(3)]
DOCUMENT = Document("d", CHUNKS)


@pytest.fixture
def engine() -> Iterator[CacheTune]:
    with CacheTune(llama(), tokenizer(), lead_in="first_token") as made:
        yield made


def test_a_disk_that_hangs_holds_up_no_close_and_is_released_when_it_answers(tmp_path: Path) -> None:
    engine = CacheTune(llama(), tokenizer(), tmp_path / "kv", lead_in="first_token", host_budget=0, read_timeout=0.3)
    engine.precompute(DOCUMENT)
    store = engine.store
    fault = Fault("stuck", ("open", "preadv", "create", "write"))
    with faulty_disk(tmp_path / "kv", fault):
        engine.prefetch(CHUNKS)
        assert engine.generate("Who?", CHUNKS, max_new_tokens=2).report.timed_out == 3
        began = time.monotonic()
        engine.close()
        assert time.monotonic() - began < 20
        engine.close()
        fault.end()
        until = time.monotonic() + 60
        while not store.closed and time.monotonic() < until:
            time.sleep(0.01)
    assert store.closed
    with ChunkStore(tmp_path / "kv") as again:
        assert again.verify().checked == 3


def test_precompute_from_its_own_progress_callback_is_refused(engine: CacheTune) -> None:
    told: list[Any] = []

    def again(progress: Any) -> None:
        told.append(progress)
        engine.precompute(DOCUMENT)

    with pytest.raises(ConfigError, match="by the progress callback of another precompute"):
        engine.precompute(DOCUMENT, progress=again)
    assert len(told) == 1
    assert engine.precompute(DOCUMENT).chunks + engine.precompute(DOCUMENT).skipped >= 3


@pytest.mark.parametrize(
    "use",
    [
        lambda engine: engine.generate("Who?", CHUNKS, max_new_tokens=2),
        lambda engine: engine.stats(),
        lambda engine: engine.documents(),
        lambda engine: engine.flush(60),
    ],
)
def test_everything_else_works_there(engine: CacheTune, use: Callable[[CacheTune], Any]) -> None:
    assert engine.precompute(DOCUMENT, progress=lambda _: use(engine)).chunks == 3
    assert [len(info.chunks) for info in engine.documents()] == [3]


def test_documents_that_use_the_engine_as_they_come(engine: CacheTune) -> None:
    def documents() -> Iterator[Document]:
        yield DOCUMENT
        engine.generate("Who?", [*CHUNKS, "Another."], max_new_tokens=2)
        engine.flush(60)
        engine.precompute(Document("inner", ["Inner."]))
        yield Document("last", ["Another.", "Last."])

    assert engine.precompute(documents()).documents == 2
    assert {info.id: len(info.chunks) for info in engine.documents()} == {"d": 3, "inner": 1, "last": 2}


def test_closing_in_the_middle_is_said_so(engine: CacheTune) -> None:
    def documents() -> Iterator[Document]:
        yield DOCUMENT
        engine.close()
        yield Document("last", ["Last."])

    with pytest.raises(EngineClosedError):
        engine.precompute(documents())
    with CacheTune(llama(), tokenizer(), lead_in="first_token") as other, pytest.raises(EngineClosedError):
        other.precompute(DOCUMENT, progress=lambda _: other.close())


class Observer(RequestObserver):
    def __init__(self, use: Callable[[], Any]) -> None:
        self.use = use

    def prefilled(self, report: Any) -> None:
        self.use()

    def answered(self, report: Any, answer: Any, seconds: float) -> None:
        self.use()


def test_observers_may_flush_and_look(engine: CacheTune) -> None:
    engine.observers.add(Observer(lambda: (engine.flush(60), engine.stats())))
    assert engine.generate("Who?", CHUNKS, max_new_tokens=2).completion_tokens == 2


def test_an_observer_may_close_the_engine(engine: CacheTune) -> None:
    engine.observers.add(Observer(engine.close))
    with pytest.raises(EngineClosedError):
        engine.generate("Who?", CHUNKS, max_new_tokens=2, eos_token_id=[])
    engine.close()


def test_closed_amid_a_stream_the_stream_says_so(engine: CacheTune) -> None:
    with engine.stream("Who?", CHUNKS, max_new_tokens=9, eos_token_id=[]) as stream:
        next(stream)
        engine.close()
        with pytest.raises(EngineClosedError):
            next(stream)


def test_it_cant_be_copied(engine: CacheTune) -> None:
    for made in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(
            CacheTuneError, match=r"an engine can't be pickled or copied.*another process makes its own"
        ):
            made(engine)
