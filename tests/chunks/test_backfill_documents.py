"""What was missed and belongs to a document is stored as the document's, or not at all; and documents that come in parts."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from tiny import llama, tokenizer

from cachetune_rag import CacheTune, Chunk, Document, StoreFullError
from cachetune_rag.chunks import backfill as missed

TEXTS = ["The lighthouse was built in 1871.", "Its lamp burned whale oil until 1902.", "The keeper kept a log."]


@pytest.fixture
def engine() -> Iterator[CacheTune]:
    with CacheTune(llama(), tokenizer(), lead_in="first_token") as made:
        yield made


def ask(engine: CacheTune, *chunks: Chunk | str, **options: Any) -> Any:
    return engine.generate("Who built it?", list(chunks), max_new_tokens=2, **options)


def chunks_of(engine: CacheTune) -> dict[str, int]:
    return {info.id: len(info.chunks) for info in engine.documents()}


def stored(engine: CacheTune) -> list[bool]:
    return [engine.store.contains(engine.runtime.assembler.key(engine.prompts.encode(text))) for text in TEXTS]


def test_it_is_stored_as_its_documents_and_goes_with_it(engine: CacheTune) -> None:
    ask(engine, Chunk(TEXTS[0], "a"), Chunk(TEXTS[1], "b"), TEXTS[2])
    assert engine.flush(60)
    assert chunks_of(engine) == {"a": 1, "b": 1}
    engine.remove("a")
    assert stored(engine) == [False, True, True]
    assert engine.prefill("Who?", [Chunk(TEXTS[0], "b")]).report.unstored == 0
    assert chunks_of(engine) == {"b": 2}
    engine.remove("b")
    assert stored(engine) == [False, False, True]


def test_a_chunk_of_two_documents_stays_until_both_are_gone(engine: CacheTune) -> None:
    with engine.runtime.model.lock.reserved():
        ask(engine, Chunk(TEXTS[0], "a"))
        ask(engine, Chunk(TEXTS[0], "b"), TEXTS[1], Chunk(TEXTS[1], "c"))
    assert engine.flush(60)
    assert chunks_of(engine) == {"a": 1, "b": 1, "c": 1}
    engine.remove("a")
    assert stored(engine)[0]
    engine.remove("b")
    assert not stored(engine)[0]


def test_removing_a_document_drops_what_waits_of_it(engine: CacheTune, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(missed, "PATIENCE", 1e6)
    with engine.runtime.model.lock.reserved():
        ask(engine, "The first of all waits as well.")
        ask(engine, Chunk(TEXTS[0], "a"), Chunk(TEXTS[1], "b"), TEXTS[2])
        engine.remove("a", missing_ok=True)
        engine.remove("b", missing_ok=True)
    assert engine.flush(60)
    assert (stored(engine), chunks_of(engine), engine.stats().unstored) == ([False, False, True], {}, 0)


def test_what_is_being_stored_when_its_document_is_removed_is_gone_too(
    engine: CacheTune, monkeypatch: pytest.MonkeyPatch
) -> None:
    removed: list[threading.Thread] = []
    compute = engine.runtime.chunk_computer.compute

    def compute_and_remove(job: Any, batch: Any) -> Any:
        encoded = compute(job, batch)
        if not removed:
            removed.append(threading.Thread(target=engine.remove, args=["a"], kwargs={"missing_ok": True}))
            removed[0].start()
            while not engine.runtime.backfill.queue.hurried:  # it has dropped what it could, and waits for this
                time.sleep(0.001)
        return encoded

    monkeypatch.setattr(engine.runtime.chunk_computer, "compute", compute_and_remove)
    ask(engine, Chunk(TEXTS[0], "a"), Chunk(TEXTS[1], "a"))
    until = time.monotonic() + 60
    while engine.stats().storing and time.monotonic() < until:
        time.sleep(0.005)
    removed[0].join(60)
    assert (stored(engine), chunks_of(engine)) == ([False, False, False], {})


def test_a_chunk_that_another_document_wants_while_it_is_stored_becomes_both_documents_even_if_the_engine_closes(
    engine: CacheTune, monkeypatch: pytest.MonkeyPatch
) -> None:
    computer, backfill = engine.runtime.chunk_computer, engine.runtime.backfill
    write = computer.write

    def write_meanwhile(encoded: Any) -> int:
        backfill.offer(engine.prompts.build(query="Who?", chunks=[Chunk(TEXTS[0], "b")]), [0])
        backfill.queue.close()
        return write(encoded)

    monkeypatch.setattr(computer, "write", write_meanwhile)
    ask(engine, Chunk(TEXTS[0], "a"))
    assert backfill.wait(60)
    assert chunks_of(engine) == {"a": 1, "b": 1}


def test_what_cant_be_added_to_its_document_is_not_stored(engine: CacheTune, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise StoreFullError("no room")

    monkeypatch.setattr(engine.store, "extend_document", full)
    ask(engine, Chunk(TEXTS[0], "a"))
    assert engine.flush(60)
    assert (stored(engine)[0], engine.stats().unstored) == (False, 1)


def test_a_document_that_comes_in_two_runs_keeps_both(engine: CacheTune) -> None:
    engine.precompute(Document("d", TEXTS[:2]), replace=False)
    engine.precompute(Document("d", TEXTS[1:]), replace=False)
    assert (chunks_of(engine), stored(engine)) == ({"d": 3}, [True] * 3)
    engine.precompute(Document("d", TEXTS[2:]))
    assert (chunks_of(engine), stored(engine)) == ({"d": 1}, [False, False, True])
