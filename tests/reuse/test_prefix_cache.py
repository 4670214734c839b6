"""Beginnings of prompts that are kept: the longest common one is taken over, chunks or not, and only what is exact."""

from __future__ import annotations

import random
from collections.abc import Iterator

import families
import numpy as np
import pytest
import torch
from tiny import llama, tokenizer
from torch import Tensor

from cachetune_rag import CacheTune
from cachetune_rag.chunks.lead_ins import LeadIns
from cachetune_rag.concurrency.deadline import DeadlinePool
from cachetune_rag.model import ModelAdapter
from cachetune_rag.reuse.config import ReuseConfig
from cachetune_rag.reuse.prefill import Assembler
from cachetune_rag.reuse.prefix_cache import MOST, PrefixCache
from cachetune_rag.reuse.state import PrefillState
from cachetune_rag.text.prompts.prompt import Chunk, Prompt
from cachetune_store import ChunkStore, Namespace

SYSTEM = "You are an agent with tools: look things up, add numbers, and answer in one word only. " * 2
CHUNKS = ["The keeper lit the lamp at dusk, as on every evening.", "The harbour master wrote a letter to the pilot."]


@pytest.fixture
def engine() -> Iterator[CacheTune]:
    with CacheTune(llama(), tokenizer(), lead_in="first_token") as engine:
        yield engine


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def read(engine: CacheTune, prompt: Prompt, ratio: float = 0.0) -> PrefillState:
    """A prompt read with reuse; its cache has as many rows as it has tokens."""
    state = engine.prefill(prompt=prompt, ratio=ratio, selector="frequency")
    assert state.cache.get_seq_length() == len(prompt.ids)
    return state


def is_full(engine: CacheTune, state: PrefillState) -> bool:
    """Whether logits and every row are those of full prefill."""
    full = engine.full_prefill(prompt=state.prompt)
    return difference(state.logits, full.logits) <= 1e-5 and all(
        difference(mine.keys, its.keys) <= 1e-5 and difference(mine.values, its.values) <= 1e-5
        for mine, its in zip(state.cache.layers, full.cache.layers, strict=True)
    )


def messages(*contents: object) -> list[dict[str, object]]:
    roles = ["system", *["user", "assistant"] * len(contents)]
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]


def test_an_agents_second_step_computes_what_is_new_alone(engine: CacheTune) -> None:
    first = read(engine, engine.prompt_from_messages(messages(SYSTEM, "How many steps?")))
    assert (first.report.prefix_kept, is_full(engine, first)) == (0, True)
    second = read(
        engine, engine.prompt_from_messages(messages(SYSTEM, "How many steps?", "Count them.", "Observation: 9"))
    )
    assert second.report.prefix_kept == len(first.prompt.ids)
    assert second.report.computed == len(second.prompt.ids) - len(first.prompt.ids)
    assert is_full(engine, second)


def test_the_same_prompt_twice_computes_its_last_token(engine: CacheTune) -> None:
    prompt = engine.prompts.build(query="How many steps?", chunks=[], prefix=SYSTEM)
    assert read(engine, prompt).report.prefix_kept == 0
    again = read(engine, prompt)
    assert again.report.prefix_kept == len(prompt.ids) - 1
    assert is_full(engine, again)
    texts = [engine.generate(prompt=prompt, max_new_tokens=8, reuse=reuse).text for reuse in (True, False, True)]
    assert len(set(texts)) == 1


def test_a_prompt_that_parts_midway_takes_over_what_is_common(engine: CacheTune) -> None:
    one, other = (engine.prompt_from_text(f"{SYSTEM}{tail}") for tail in ("Left at the pier.", "Right, past the lamp."))
    read(engine, one)
    state = read(engine, other)
    assert state.report.prefix_kept == len(SYSTEM)  # a token a byte
    assert is_full(engine, state)


def test_missed_chunks_belong_to_an_exact_beginning_and_found_ones_end_it(engine: CacheTune) -> None:
    prompt = engine.prompts.build(query="Who?", chunks=CHUNKS, prefix=SYSTEM)
    missing = engine.prefill(prompt=prompt)  # computes both, and stores them
    assert (missing.report.missed, is_full(engine, missing)) == (sum(map(len, CHUNKS)), True)
    found = read(engine, prompt)
    start = prompt.spans[0].start
    assert (found.report.prefix_kept, found.report.reused) == (start, sum(map(len, CHUNKS)))
    with CacheTune(llama(), tokenizer(), lead_in="first_token") as fresh:
        fresh.precompute(CHUNKS)
        assert difference(read(fresh, prompt).logits, found.logits) <= 1e-5


def test_what_saw_a_reused_chunk_is_never_kept(engine: CacheTune) -> None:
    """The rows behind it are approximate: the next prompt, which has the same text but no chunk, must not get them."""
    engine.precompute(CHUNKS[0])
    text = [SYSTEM, Chunk(CHUNKS[0]), " And then? " * 20]
    reused = read(engine, engine.prompt_from_text(text, recognise=False))
    assert reused.report.reused == len(CHUNKS[0])
    plain = engine.prompt_from_text("".join(str(getattr(part, "text", part)) for part in text), recognise=False)
    assert plain.ids == reused.prompt.ids
    state = read(engine, plain)
    assert state.report.prefix_kept == reused.prompt.spans[0].start
    assert is_full(engine, state)
    assert not is_full(engine, reused), "else this shows nothing"


def test_a_chunk_in_the_midst_ends_the_beginning_though_an_earlier_one_was_missed(engine: CacheTune) -> None:
    engine.precompute(CHUNKS[1])
    prompt = engine.prompts.build(query="Who?", chunks=CHUNKS, prefix=SYSTEM)
    engine.runtime.backfill.store = lambda *_: 1  # type: ignore[method-assign]  # a store that is full
    assert engine.prefill(prompt=prompt, ratio=0, selector="none").report.missed == len(CHUNKS[0])
    again = engine.prefill(prompt=prompt, ratio=0, selector="none")
    assert again.report.prefix_kept == prompt.spans[1].start
    assert (again.report.missed, again.report.reused) == (len(CHUNKS[0]), len(CHUNKS[1]))


def test_full_prefill_neither_takes_nor_leaves_anything(engine: CacheTune) -> None:
    prompt = engine.prompts.build(query="How many steps?", chunks=[], prefix=SYSTEM)
    assert engine.full_prefill(prompt=prompt).report.prefix_kept == 0
    assert read(engine, prompt).report.prefix_kept == 0
    assert engine.full_prefill(prompt=prompt).report.prefix_kept == 0


def test_a_short_common_beginning_is_not_worth_another_kind_of_attention(engine: CacheTune) -> None:
    read(engine, engine.prompt_from_text("Now. " + "One thing at length. " * 20))
    assert read(engine, engine.prompt_from_text("Now. " + "And another, as long. " * 20)).report.prefix_kept == 0


@pytest.mark.parametrize("family", families.FAMILIES, ids=families.ids_of(families.FAMILIES))
def test_every_family_goes_on_behind_a_beginning_as_if_it_had_read_it(family: families.Family) -> None:
    """Sliding windows included: prompts are several windows long."""
    adapter = ModelAdapter(families.model_of(family.name))
    ids = torch.tensor(families.random_ids(110, seed=3))
    _, whole = adapter.full_forward(ids[:90])
    kept = adapter.rows_of_cache(whole, 90)
    cache = kept.to_cache(70)
    logits = adapter.forward(ids[70:], cache)
    expected, full = adapter.full_forward(ids)
    assert difference(logits, expected) <= family.tolerance
    for mine, its in zip(cache.layers, full.layers, strict=True):
        assert difference(mine.keys, its.keys) <= family.tolerance
    for i, layer in enumerate(whole.layers):
        assert torch.equal(kept.keys(i), layer.keys), "what is kept stays as it was"


def test_short_and_long_prompts_of_long_rope_keep_beginnings_apart() -> None:
    """The same tokens have other keys in a prompt that is computed with the short factors."""
    adapter, store, pool = ModelAdapter(families.model_of("phi3-longrope")), ChunkStore(None), DeadlinePool(None)
    namespace = Namespace("model", "tokenizer", "float32", ((families.BOS,),))
    lead_ins = LeadIns(store, namespace, choose=False, vocabulary=families.VOCAB, limit=None)
    assembler = Assembler(adapter, store, lead_ins, pool)
    ids = tuple(families.random_ids(130, seed=4))
    kept = []
    for length in (50, 100, 60, 120):
        prompt = Prompt(ids[:length], (), (), ())
        state = assembler.prefill(prompt, ReuseConfig(), 0.0)
        kept.append(state.report.prefix_kept)
        assert difference(state.logits, adapter.full_forward(torch.tensor(ids[:length]))[0]) <= 1e-5
    assert kept == [0, 0, 50, 100]
    pool.close()
    store.close()


def test_prompts_that_vary_at_their_ends_are_kept_once_and_growing_ones_at_full_length() -> None:
    buffers = ModelAdapter(llama()).new_buffers(1000)
    cache, copies = PrefixCache(), []
    generator = random.Random(0)

    def keep(ids: list[int]) -> None:
        cache.keep(np.array(ids), buffers.row_bytes, lambda n: copies.append(n) or buffers.copy_first(n))  # type: ignore[func-returns-value]

    shots = [generator.randrange(261) for _ in range(500)]
    for _ in range(20):
        keep([*shots, *(generator.randrange(261) for _ in range(10))])
    assert copies == [510]
    conversation = [300, *shots]
    for _ in range(20):
        keep(conversation)
        conversation += [generator.randrange(261) for _ in range(16)]
    assert copies[1:] == [501 + 16 * i for i in range(20)], (
        "each goes on where the one before ended, and takes its place"
    )
    assert cache.find(np.array(shots), 500) is not None, "for there is room for others beside it"


def test_no_more_than_a_few_beginnings_are_compared() -> None:
    buffers = ModelAdapter(llama()).new_buffers(2)
    cache = PrefixCache()
    for first in range(MOST + 10):
        cache.keep(np.array([first, first]), buffers.row_bytes, buffers.copy_first)
    kept = [first for first in range(MOST + 10) if cache.find(np.array([first]), 1) is not None]
    assert kept == list(range(10, MOST + 10))


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_kernels", [False, True], ids=["plain", "kernels"])
def test_beginnings_are_taken_over_on_a_gpu(cuda_kernels: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    options = {"lead_in": "first_token", "cuda_kernels": cuda_kernels}
    with CacheTune(llama().cuda(), tokenizer(), **options) as engine:
        engine.precompute(CHUNKS)
        for build in (
            lambda tail: engine.prompts.build(query=tail, chunks=[], prefix=SYSTEM),
            lambda tail: engine.prompts.build(query=tail, chunks=CHUNKS, prefix=SYSTEM),
        ):
            for tail in ("How many steps?", "Who wrote it?", "How many steps?"):
                prompt = build(tail)
                reused, full = (
                    engine.generate(prompt=prompt, ratio=1.0, max_new_tokens=8, reuse=reuse) for reuse in (True, False)
                )
                assert reused.text == full.text
        plain = engine.prompts.build(query="How many steps?", chunks=[], prefix=SYSTEM)
        state = read(engine, plain)
        assert state.report.prefix_kept == len(plain.ids) - 1
        assert difference(state.logits, engine.full_prefill(prompt=plain).logits) <= 1e-4
        behind = engine.prompts.build(query="Who?", chunks=CHUNKS, prefix=SYSTEM)
        assert read(engine, behind).report.prefix_kept == behind.spans[0].start
