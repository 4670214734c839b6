"""The bench: what calibration and tuning do with an engine's model and store, beside its requests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tiny import llama, tokenizer

from cachetune_rag import CacheTune, ConfigError, Document, EngineClosedError
from cachetune_rag.measuring.bench import Bench
from cachetune_rag.reuse.config import PAPER
from cachetune_store import ChunkStore

TEXTS = [
    "The lighthouse was built in 1871 by three brothers.",
    "Visitors climb 214 steps; the last forty are a ladder.",
]


@pytest.fixture
def engine() -> Iterator[CacheTune]:
    with CacheTune(llama(), tokenizer()) as engine:
        yield engine


def test_a_measured_prefill_equals_the_engines_and_counts_as_no_request(engine: CacheTune) -> None:
    engine.precompute([Document("a", TEXTS)])
    bench, before = engine.runtime.bench(), engine.stats()
    prompt = bench.prompt("How many steps?", TEXTS)
    full, reused = bench.prefill(prompt, None), bench.prefill(prompt, PAPER)
    rows, seconds = bench.transfer(prompt)
    assert (rows, seconds > 0) == (sum(map(len, prompt.chunk_ids)), True)
    after = engine.stats()
    assert (after.requests, after.full_prefills) == (before.requests, before.full_prefills)
    asked = engine.prefill(prompt=prompt, ratio=PAPER.ratio, selector=PAPER.selector)
    torch.testing.assert_close(full.logits, engine.full_prefill(prompt=prompt).logits)
    torch.testing.assert_close(reused.logits, asked.logits)


def test_a_continuation_is_the_greedy_answer_and_leaves_the_prompt_as_it_was(engine: CacheTune) -> None:
    bench = engine.runtime.bench()
    prompt = bench.prompt("How many steps?", TEXTS)
    state = bench.prefill(prompt, None)
    target = bench.continuation(state, 5)
    assert target == engine.generate(prompt=prompt, max_new_tokens=5, do_sample=False, reuse=False).token_ids
    assert state.cache.get_seq_length() == len(prompt.ids)
    logits = torch.cat(bench.logits_behind(state, target))
    assert tuple(logits.argmax(-1).tolist()) == target


def test_missing_chunks_are_stored_once_and_stored_ones_tell_their_codec(engine: CacheTune) -> None:
    bench = engine.runtime.bench()
    prompts = [bench.prompt("How many steps?", TEXTS), bench.prompt("Who built it?", TEXTS[:1])]
    assert bench.store_missing(prompts) == set()
    assert [bench.codec_of(bench.key(ids)) for ids in prompts[0].chunk_ids] == ["exact", "exact"]
    assert bench.store_missing(prompts) == {"exact"}


def test_on_another_store_its_chunks_are_read_and_no_others(engine: CacheTune) -> None:
    engine.precompute([Document("a", TEXTS)])
    bench = engine.runtime.bench()
    prompt = bench.prompt("How many steps?", TEXTS)
    with ChunkStore(None) as store:
        other = bench.on(store)
        key = bench.key(prompt.chunk_ids[0])
        chunk = engine.store.whole(key)
        assert chunk is not None
        store.write(chunk)
        assert (other.codec_of(key), other.codec_of(bench.key(prompt.chunk_ids[1]))) == ("exact", None)
        assert other.prefill(prompt, PAPER).report.missed == len(prompt.chunk_ids[1])
    assert bench.prefill(prompt, PAPER).report.missed == 0


def test_prompts_are_checked_as_those_of_requests(engine: CacheTune) -> None:
    bench = engine.runtime.bench()
    prompt = bench.prompt("How many steps?", TEXTS)
    assert bench.checked(prompt) is prompt
    with pytest.raises(ConfigError, match="the prompt has no tokens"):
        bench.checked(type(prompt)(ids=(), spans=(), chunk_ids=(), chunk_texts=()))


@pytest.mark.parametrize(
    "use",
    [
        lambda bench, state: bench.prefill(state.prompt, None),
        lambda bench, state: bench.transfer(state.prompt),
        lambda bench, state: bench.continuation(state, 2),
        lambda bench, state: bench.logits_behind(state, (1, 2)),
        lambda bench, state: bench.store_missing([state.prompt]),
    ],
)
def test_nothing_is_measured_on_a_closed_engine(use: Callable[[Bench, Any], Any]) -> None:
    with CacheTune(llama(), tokenizer()) as engine:
        bench = engine.runtime.bench()
        state = bench.prefill(bench.prompt("How many steps?", TEXTS), None)
    with pytest.raises(EngineClosedError):
        use(bench, state)
