"""Text of a document that is removed or replaced while requests know of it doesn't come back with them."""

from __future__ import annotations

import copy
import pickle
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tiny import llama, tokenizer

from cachetune_rag import CacheTune, Chunk, Document
from cachetune_store import changes_so_far
from cachetune_store.removals import Removals

OLD, NEW, OTHER = "The lighthouse was built in 1871, by hand.", "Its lamp burned whale oil.", "The keeper kept a log."


@pytest.fixture
def engine() -> Iterator[CacheTune]:
    with CacheTune(llama(), tokenizer(), lead_in="first_token") as made:
        yield made


def texts(engine: CacheTune) -> set[str]:
    return {text for _, text, _ in engine.store.texts()}


def holds(engine: CacheTune) -> dict[str, int]:
    return {info.id: len(info.chunks) for info in engine.documents()}


def remove(engine: CacheTune) -> None:
    engine.remove("d", missing_ok=True)


def remove_past_the_engine(engine: CacheTune) -> None:
    engine.store.extend_document("d", [])
    engine.store.delete_document("d")


def replace(engine: CacheTune) -> None:
    engine.precompute(Document("d", [NEW]))


def delete_tenant(engine: CacheTune) -> None:
    engine.store.delete_tenant("")


ENDINGS = [remove, remove_past_the_engine, replace, delete_tenant]


@pytest.mark.parametrize("end", ENDINGS)
@pytest.mark.parametrize("known", [False, True], ids=["unknown", "known"])
def test_while_an_answer_streams(engine: CacheTune, end: Callable[[CacheTune], None], known: bool) -> None:
    if known:
        engine.precompute(Document("d", [OTHER]))
    stream = engine.stream("Who?", [Chunk(OLD, "d")], max_new_tokens=4)
    next(stream)
    end(engine)
    for _ in stream:
        pass
    assert engine.flush(60)
    assert OLD not in texts(engine)
    assert holds(engine) == ({"d": 1} if end is replace else {})
    assert (engine.stats().withdrawn, engine.stats().unstored) == (1, 0)


def test_while_its_document_is_indexed_again_as_it_was(engine: CacheTune) -> None:
    engine.precompute(Document("d", [NEW]))
    stream = engine.stream("Who?", [Chunk(OLD, "d")], max_new_tokens=4)
    next(stream)
    replace(engine)
    list(stream)
    assert engine.flush(60)
    assert (texts(engine), holds(engine), engine.stats().withdrawn) == ({NEW}, {"d": 1}, 1)


@pytest.mark.parametrize("end", ENDINGS)
def test_before_a_stream_is_read_and_when_it_is_given_up(engine: CacheTune, end: Callable[[CacheTune], None]) -> None:
    late = engine.stream("Who?", [Chunk(OLD, "d")], max_new_tokens=2)
    given_up = engine.stream("What?", [Chunk(OLD, "d")], max_new_tokens=2)
    next(given_up)
    end(engine)
    given_up.close()
    assert list(late)
    assert engine.flush(60)
    assert OLD not in texts(engine)


def test_what_names_no_document_goes_with_the_tenant_alone(engine: CacheTune) -> None:
    stream = engine.stream("Who?", [OLD, Chunk(OTHER, "d")], max_new_tokens=2)
    next(stream)
    engine.remove("d", missing_ok=True)
    stream.close()
    assert engine.flush(60)
    assert texts(engine) == {OLD}
    stream = engine.stream("Who?", [NEW], max_new_tokens=2)
    next(stream)
    engine.store.delete_tenant("")
    stream.close()
    assert engine.flush(60)
    assert texts(engine) == set()


def test_of_requests_that_wait_in_a_list(engine: CacheTune) -> None:
    requests = [{"query": "Who?", "chunks": [OTHER]}, {"query": "Who?", "chunks": [Chunk(OLD, "d")]}]
    answers = engine.generate_many(requests, max_new_tokens=2)
    next(answers)
    engine.remove("d", missing_ok=True)
    assert len(list(answers)) == 1
    assert engine.flush(60)
    assert texts(engine) == {OTHER}


def test_of_a_prompt_that_was_made_before(engine: CacheTune) -> None:
    prompt = engine.prompts.build(query="Who?", chunks=[Chunk(OLD, "d")])
    engine.remove("d", missing_ok=True)
    for same in (prompt, copy.deepcopy(prompt), pickle.loads(pickle.dumps(prompt))):
        assert engine.prefill(prompt=same).report.unstored == 1
    assert texts(engine) == set()
    assert engine.prefill("Who?", [Chunk(OLD, "d")]).report.unstored == 0  # somebody says anew that it is there
    assert (texts(engine), holds(engine)) == ({OLD}, {"d": 1})


def test_a_new_version_that_holds_the_chunk_gets_it(engine: CacheTune) -> None:
    stream = engine.stream("Who?", [Chunk(OLD, "d"), Chunk(OTHER, "d")], max_new_tokens=2)
    next(stream)
    engine.precompute(Document("d", [NEW, OLD]))
    stream.close()
    assert engine.flush(60)
    assert (texts(engine), holds(engine)) == ({NEW, OLD}, {"d": 2})


def test_a_recognised_chunk_whose_document_is_removed(engine: CacheTune) -> None:
    engine.precompute(Document("d", [OLD]))
    prompt = engine.prompt_from_text(f"Read: {OLD} Who?")
    assert prompt.recognised == 1
    engine.remove("d")
    assert engine.prefill(prompt=prompt).report.missed == len(OLD)
    assert (texts(engine), holds(engine)) == (set(), {})


def test_a_recognised_chunk_stored_behind_other_lead_ins_stays_its_documents() -> None:
    with CacheTune(llama(), tokenizer()) as engine:
        engine.precompute(Document("d", [OLD]))
        engine.precompute(Document("e", [f"Number {i} of the many pages of the log." for i in range(40)]))
        assert len(engine.namespace.lead_ins) > 1
        state = engine.prefill(prompt=engine.prompt_from_text(f"Read: {OLD} Who?"))
        assert (state.report.missed, state.report.unstored, holds(engine)["d"]) == (len(OLD), 0, 2)
        engine.remove("d")
        assert OLD not in texts(engine)


def test_no_lead_in_is_made_of_what_was_removed() -> None:
    secret = "The secret is 4711. "
    with CacheTune(llama(), tokenizer()) as engine:
        engine.prefill("Who?", [Chunk(secret * 40, "d")])
        engine.remove("d")
        engine.prefill("Who?", [Chunk("The keeper kept a log. " * 40, "e")])
        engine.prefill("Who?", [Chunk("Its lamp burned oil. " * 40, "f")])
        leads = engine.namespace.lead_ins
        assert len(leads) > 1
        assert not any("4711" in engine.tokenizer.decode(lead) for lead in leads)


def test_another_store_object_on_the_folder_removes_it(tmp_path: Path) -> None:
    model = llama()
    with CacheTune(model, tokenizer(), tmp_path, lead_in="first_token") as one:
        stream = one.stream("Who?", [Chunk(OLD, "d")], max_new_tokens=2)
        next(stream)
        with CacheTune(model, tokenizer(), tmp_path, lead_in="first_token") as other:
            other.remove("d", missing_ok=True)
        stream.close()
        assert one.flush(60)
        assert texts(one) == set()


def test_a_removal_between_adding_and_writing(engine: CacheTune, monkeypatch: pytest.MonkeyPatch) -> None:
    write = engine.store.write

    def remove_and_write(chunk: Any) -> int:
        engine.store.delete_document("d")
        return write(chunk)

    monkeypatch.setattr(engine.store, "write", remove_and_write)
    assert engine.prefill("Who?", [Chunk(OLD, "d")]).report.unstored == 1
    assert (texts(engine), holds(engine)) == (set(), {})


def test_what_is_remembered_is_bounded_and_forgetting_is_on_the_safe_side() -> None:
    removals = Removals(most=3)
    before = changes_so_far()
    for i in range(10):
        removals.note("", str(i))
    assert all(removals.since(before, "", str(i)) for i in range(10))
    assert removals.since(before, "", "never removed")
    now = changes_so_far()
    assert not any(removals.since(now, "", str(i)) for i in range(10))
    assert not removals.since(before, "", None)


@pytest.mark.parametrize("seed", range(3))
def test_any_interleaving(engine: CacheTune, seed: int) -> None:
    """Readers and removers at once. Each text says which version of which document it is of; what is removed last stays away."""
    ids, stop = ["a", "b", "c"], threading.Event()

    def text(id: str, version: int) -> str:
        return f"Document {id} in version {version}: {id * 8}."

    def read(number: int) -> None:
        chance = random.Random(f"{seed} {number}")
        while not stop.is_set():
            chunks = [Chunk(text(id, chance.randrange(3)), id) for id in chance.sample(ids, 2)]
            stream = engine.stream("Who?", chunks, max_new_tokens=3)
            for _ in range(chance.randrange(4)):
                next(stream, None)
            chance.choice([stream.close, lambda held=stream: list(held)])()

    def change() -> None:
        chance = random.Random(seed)
        for _ in range(12):
            id = chance.choice(ids)
            chance.choice([remove_one, replace_one])(id)

    def remove_one(id: str) -> None:
        engine.remove(id, missing_ok=True)

    def replace_one(id: str) -> None:
        engine.precompute(Document(id, [text(id, 9)]))

    with ThreadPoolExecutor(4) as pool:
        readers = [pool.submit(read, number) for number in range(3)]
        try:
            pool.submit(change).result(120)
            # Those that are on their way now began before the last change.
            late = [engine.stream("Who?", [Chunk(text(id, 0), id)], max_new_tokens=2) for id in ids]
            for stream in late:
                next(stream)
        finally:
            stop.set()
        for reader in readers:
            reader.result(120)
    for id in ids:
        replace_one(id)
    for stream in late:
        stream.close()
    assert engine.flush(60)
    assert texts(engine) == {text(id, 9) for id in ids}
    assert holds(engine) == dict.fromkeys(ids, 1)
    for id in ids:
        remove_one(id)
    assert (texts(engine), holds(engine)) == (set(), {})
