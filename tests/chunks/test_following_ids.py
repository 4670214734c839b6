"""A recogniser of token ids follows its store: what any process adds and removes, of one tenant alone."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from small_tokenizers import byte_level, sentencepiece
from tiny import llama, tokenizer

from cachetune_rag import CacheTune, Document
from cachetune_rag.chunks import id_recognition
from cachetune_rag.chunks.id_recognition import StoreIdRecognizer
from cachetune_rag.report import Report
from cachetune_rag.reuse.config import ReuseConfig
from cachetune_rag.text.prompts.prompt import Prompt, PromptBuilder
from cachetune_rag.text.recognising.id_spans import IdSpan, prompt_of_ids
from cachetune_rag.text.recognising.spelling import Spelling
from cachetune_store import ChunkStore, Namespace, StoreError, make_key

PASSAGES = ["The keeper lit the lamp at dusk, as every evening.", "The harbour master's letter names eleven ships."]
MINUTES = 60.0


@contextmanager
def following(engine: CacheTune, **options: Any) -> Iterator[StoreIdRecognizer]:
    runtime = engine.runtime
    made = StoreIdRecognizer(
        runtime.store,
        lambda: runtime.lead_ins.namespaces,
        runtime.prompts.encode_many,
        Spelling(runtime.tokenizer),
        **options,
    )
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[CacheTune]:
    with CacheTune(llama(), tokenizer(), tmp_path / "kv") as made:
        yield made


def ids_of(text: str) -> list[int]:
    return list(tokenizer()(f"Context:\n* {text}\nQuestion: who?")["input_ids"])


def found(recognizer: StoreIdRecognizer) -> list[bool]:
    return [bool(recognizer.find(ids_of(text))) for text in PASSAGES]


def test_what_is_stored_is_known_and_reused_from_ids_alone(engine: CacheTune) -> None:
    engine.precompute(PASSAGES)
    ids = ids_of("\n* ".join(PASSAGES))
    with following(engine) as recognizer:
        assert recognizer.catch_up(MINUTES)
        known = recognizer.known
        assert (known.chunks, known.waiting, known.unlike, known.complete, known.error) == (2, 0, 0, True, None)
        spans = recognizer.find(ids)
    prompt = prompt_of_ids(ids, spans)
    assert [span.key for span in spans] == [engine.runtime.assembler.key(chunk) for chunk in prompt.chunk_ids]
    state = engine.runtime.assembler.prefill(prompt, ReuseConfig("frequency", 0.3), time.perf_counter())
    usual = engine.prefill(prompt=engine.prompt_from_text("Context:\n* " + "\n* ".join(PASSAGES) + "\nQuestion: who?"),
                           selector="frequency", ratio=0.3)  # fmt: skip
    assert state.report.reused == usual.report.reused > 0
    assert torch.allclose(state.logits, usual.logits, atol=1e-5)


def prefilled(engine: CacheTune, prompt: Prompt) -> Report:
    """The report; what was missed is stored when this returns."""
    runtime = engine.runtime
    state = runtime.assembler.prefill(prompt, ReuseConfig("frequency", 0.3), time.perf_counter())
    runtime.backfill.offer(state.prompt, state.missed)
    engine.flush()
    return state.report


def test_a_chunk_that_had_to_make_room_is_stored_again_with_its_text(tmp_path: Path) -> None:
    ids = ids_of(PASSAGES[0])
    with CacheTune(llama(), tokenizer(), tmp_path) as engine:
        engine.precompute([Document("a", PASSAGES)])
    shutil.rmtree(tmp_path / "chunks")
    with CacheTune(llama(), tokenizer(), tmp_path) as engine, following(engine) as recognizer:
        assert recognizer.catch_up(MINUTES)
        prompt = prompt_of_ids(ids, recognizer.find(ids))
        assert prefilled(engine, prompt).missed == len(PASSAGES[0])
        assert prefilled(engine, prompt).missed == 0
        assert PASSAGES[0] in [text for _, text, _ in engine.runtime.store.texts()]
        assert engine.prefill(prompt=engine.prompt_from_text(PASSAGES[0] + " Who?")).report.recognised == 1


def test_a_chunk_that_nobody_knows_the_text_of_is_computed_and_not_stored(engine: CacheTune) -> None:
    ids = ids_of(PASSAGES[0])
    chunk = engine.prompts.encode(PASSAGES[0])
    start = next(i for i in range(len(ids)) if ids[i : i + len(chunk)] == chunk)
    nameless = prompt_of_ids(ids, [IdSpan(start, start + len(chunk), "a")])
    assert prefilled(engine, nameless).missed == prefilled(engine, nameless).missed == len(chunk)
    assert engine.stats().withdrawn == 2
    named = prompt_of_ids(ids, [IdSpan(start, start + len(chunk), "a")], {"a": PASSAGES[0]})
    assert (prefilled(engine, named).missed, prefilled(engine, named).missed) == (len(chunk), 0)


def test_chunks_that_others_add_and_remove_are_followed(engine: CacheTune) -> None:
    with following(engine, look_every=0.01) as recognizer:
        assert recognizer.catch_up(MINUTES)
        assert found(recognizer) == [False, False]
        with CacheTune(llama(), tokenizer(), engine.runtime.store.path) as other:
            other.precompute([Document("a", PASSAGES[:1]), Document("b", PASSAGES[1:])])
            assert recognizer.catch_up(MINUTES)
            assert found(recognizer) == [True, True]
            other.remove("a")
            assert recognizer.catch_up(MINUTES)
            assert found(recognizer) == [False, True]
            assert recognizer.known.chunks == 1


def test_a_change_is_noticed_without_being_told(engine: CacheTune) -> None:
    with following(engine, look_every=0.01) as recognizer:
        assert recognizer.catch_up(MINUTES)
        engine.precompute(PASSAGES)
        deadline = time.monotonic() + MINUTES
        while found(recognizer) != [True, True]:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_another_tenants_chunks_are_never_known(engine: CacheTune) -> None:
    with CacheTune(llama(), tokenizer(), engine.runtime.store.path, tenant="other") as other:
        other.precompute(PASSAGES[:1])
        engine.precompute(PASSAGES[1:])
        with following(engine) as mine, following(other) as theirs:
            assert mine.catch_up(MINUTES)
            assert theirs.catch_up(MINUTES)
            assert (found(mine), found(theirs)) == ([False, True], [True, False])
            assert mine.known.chunks == theirs.known.chunks == 1


def stored(store: ChunkStore, namespace: Namespace, ids: list[int], text: str) -> None:
    rows = [(torch.zeros(len(ids), 1, 4), torch.zeros(len(ids), 1, 4))]
    store.put(make_key(namespace, ids), rows, torch.zeros(len(ids)), namespace=namespace, token_ids=ids, text=text)


def follow(store: ChunkStore, namespaces: Callable[[], tuple[Namespace, ...]]) -> StoreIdRecognizer:
    return StoreIdRecognizer(
        store, namespaces, PromptBuilder(tokenizer()).encode_many, Spelling(tokenizer()), look_every=0.01
    )


def space(name: str) -> Namespace:
    return Namespace(name, "tokenizer", "float32", ((1,),))


def test_a_text_that_gives_other_ids_than_its_chunk_was_computed_from_is_not_recognised(
    caplog: pytest.LogCaptureFixture,
) -> None:
    encode = PromptBuilder(tokenizer()).encode
    with ChunkStore(None) as store:
        stored(store, space("a"), encode(PASSAGES[0]), "Something else is what its text says now, at length.")
        stored(store, space("a"), encode(PASSAGES[1]), PASSAGES[1])
        recognizer = follow(store, lambda: (space("a"),))
        with caplog.at_level(logging.WARNING):
            assert recognizer.catch_up(MINUTES)
        assert found(recognizer) == [False, True]
        assert recognizer.find(ids_of("Something else is what its text says now, at length.")) == []
        assert (recognizer.known.unlike, recognizer.known.chunks) == (1, 1)
        assert "1 stored chunks have texts that this tokenizer reads otherwise" in caplog.text
        store.discard(make_key(space("a"), encode(PASSAGES[0])))
        recognizer.close()


def test_namespaces_come_and_go() -> None:
    encode = PromptBuilder(tokenizer()).encode
    now: list[Namespace] = [space("a")]
    with ChunkStore(None) as store:
        for name, text in zip("ab", PASSAGES, strict=True):
            stored(store, space(name), encode(text), text)
        recognizer = follow(store, lambda: tuple(now))
        for names, wanted in (("a", [True, False]), ("ba", [True, True]), ("b", [False, True]), ("c", [False, False])):
            now[:] = map(space, names)
            assert recognizer.catch_up(MINUTES)
            assert found(recognizer) == wanted
        recognizer.close()


def test_a_store_that_can_not_be_read_for_a_while_costs_no_chunk_that_is_known(
    engine: CacheTune, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine.precompute(PASSAGES[:1])

    def fail() -> None:
        raise StoreError("the disk is gone")

    with following(engine, look_every=0.01) as recognizer, caplog.at_level(logging.WARNING):
        assert recognizer.catch_up(MINUTES)
        with monkeypatch.context() as patch:
            patch.setattr(engine.runtime.store, "revision", fail)
            assert not recognizer.catch_up(MINUTES)
            assert (recognizer.known.error, recognizer.known.complete) == ("the disk is gone", False)
            assert not recognizer.catch_up(MINUTES)
            assert found(recognizer) == [True, False]
        engine.precompute(PASSAGES[1:])
        assert recognizer.catch_up(MINUTES)
        assert found(recognizer) == [True, True]
        assert (recognizer.known.error, recognizer.known.complete) == (None, True)
    assert caplog.text.count("the disk is gone") == 1


def test_what_is_known_is_found_while_the_rest_is_read(engine: CacheTune, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(id_recognition, "BATCH", 2)
    texts = [f"{letter * 5}: {PASSAGES[0]}" for letter in "abcde"]
    engine.precompute(texts)
    batches: list[int] = []
    seen: list[int] = []

    def slowly(some: list[str]) -> list[tuple[int, ...]]:
        seen.append(sum(bool(recognizer.find(ids_of(text))) for text in texts) if batches else 0)
        batches.append(len(some))
        return engine.prompts.encode_many(some)

    runtime = engine.runtime
    recognizer = StoreIdRecognizer(runtime.store, lambda: (runtime.namespace,), slowly, Spelling(runtime.tokenizer))
    assert recognizer.catch_up(MINUTES)
    recognizer.close()
    assert sum(batches) == len(texts)
    assert seen == [sum(batches[:i]) for i in range(len(batches))]
    assert batches == [2, 2, 1]


@pytest.mark.parametrize(
    "make", [tokenizer, byte_level, sentencepiece, lambda: sentencepiece(scheme="always"), lambda: sentencepiece(legacy=True)]
)  # fmt: skip
def test_many_texts_are_tokenised_as_each_alone(make: Callable[[], Any]) -> None:
    builder = PromptBuilder(make())
    texts = [
        *PASSAGES,
        "",
        " a",
        "\n\nb ",
        "</s> <|im_end|> and [INST] spelt out",
        "\u6f22\u5b57",
        "<tool_call>",
        "0",
        ")",
    ]
    assert builder.encode_many(texts) == [tuple(builder.encode(text)) for text in texts]
    assert builder.encode_many([]) == []
