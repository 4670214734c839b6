"""Chunks of a request: texts or `Chunk`s that know their document, wherever chunks are taken."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from small_tokenizers import byte_level
from tiny import llama, tokenizer

from cachetune_rag import CacheTune, Chunk, ConfigError, PromptError, Text
from cachetune_rag.text.prompts.prompt import Prompt, PromptBuilder

TEXTS = ["The dam is 214 metres high. " * 4, "Salmon climb a ladder of 36 steps. " * 4]


@pytest.fixture(name="engine", scope="module")
def _engine() -> Iterator[CacheTune]:
    with CacheTune(llama(), tokenizer(), None, lead_in="first_token") as engine:
        yield engine


def test_a_prompt_knows_its_chunks_documents() -> None:
    builder = PromptBuilder(byte_level())
    prompt = builder.build(query="q", chunks=[Chunk("A", "one"), "B", Chunk("C"), Chunk("A", "two")])
    assert prompt.chunk_texts == ("A", "B", "C", "A")
    assert prompt.chunk_documents == ("one", None, None, "two")
    assert prompt.ids == builder.build(query="q", chunks=["A", "B", "C", "A"]).ids
    prompt = builder.build_messages([{"role": "user", "content": [Chunk("A", "one"), Text(" "), Chunk("B")]}])
    assert prompt.chunk_documents == ("one", None)
    assert builder.build_text([Chunk("A", "one")]).chunk_documents == ("one",)
    assert Prompt((1,), (), ((1,),), ("A",)).chunk_documents == (None,)


@pytest.mark.parametrize("make", [tuple, list, deque, iter, np.array])
def test_chunks_are_any_ordered_collection(engine: CacheTune, make: Any) -> None:
    expected = engine.prompts.build(query="How high?", chunks=TEXTS).ids
    assert engine.prompts.build(query="How high?", chunks=make(TEXTS)).ids == expected
    assert engine.prefill("How high?", make(TEXTS)).prompt.ids == expected
    [answer] = engine.generate_many([{"query": "How high?", "chunks": make(TEXTS)}], max_new_tokens=1)
    assert answer.report.prompt_tokens == len(expected)


def test_every_request_takes_chunks_with_their_documents(engine: CacheTune) -> None:
    chunks = [Chunk(TEXTS[0], "dam"), TEXTS[1]]
    assert engine.prefill("How high?", chunks).prompt.chunk_documents == ("dam", None)
    assert engine.full_prefill("How high?", chunks).prompt.chunk_documents == ("dam", None)
    assert engine.generate("How high?", chunks, max_new_tokens=1).report.missed == 0
    with engine.stream("How high?", chunks, max_new_tokens=1) as pieces:
        assert "".join(pieces) == pieces.answer.text
    engine.prefetch(chunks).cancel()
    assert [a.report.missed for a in engine.generate_many([{"query": "q", "chunks": chunks}], max_new_tokens=1)] == [0]


@pytest.mark.parametrize(
    "chunks", [None, "one string", b"bytes", {"a": 1}, {"a", "b"}, 3, [None], ["a", b"b"], ["\ud800"]]
)
@pytest.mark.parametrize("call", ["generate", "stream", "prefill", "full_prefill", "prefetch", "build"])
def test_other_chunks_are_refused(engine: CacheTune, call: str, chunks: Any) -> None:
    function = engine.prompts.build if call == "build" else getattr(engine, call)
    # What is no list is an argument that can't be meant; a text in it that can't be used is the prompt's fault.
    refusal = PromptError if call == "build" or isinstance(chunks, list) else ConfigError
    with pytest.raises(refusal, match="chunks"):
        function(chunks=chunks, **({} if call == "prefetch" else {"query": "q"}))


@pytest.mark.parametrize("document", ["", 3, b"x"])
def test_a_document_is_named_by_a_str(document: Any) -> None:
    with pytest.raises(PromptError, match=r"chunks\[0\] has the document"):
        PromptBuilder(byte_level()).build(query="q", chunks=[Chunk("A", document)])


@pytest.mark.parametrize("query", [3, b"q", ["q"], {"role": "user"}, "\ud800"])
def test_a_query_is_a_str(engine: CacheTune, query: Any) -> None:
    with pytest.raises(PromptError, match="query"):
        engine.generate(query, TEXTS)


@pytest.mark.parametrize("prompt", ["text", [1, 2], {"query": "q"}])
def test_a_prompt_is_one_that_was_built(engine: CacheTune, prompt: Any) -> None:
    with pytest.raises(PromptError, match="build one"):
        engine.generate(prompt=prompt)


def test_a_request_takes_a_prompt_or_its_parts(engine: CacheTune) -> None:
    prompt = engine.prompts.build(query="q", chunks=TEXTS)
    with pytest.raises(ConfigError, match="either prompt="):
        engine.generate(prompt=prompt, chunks=TEXTS)
