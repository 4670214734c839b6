"""Somebody else than the engine owns the memory that a prompt's keys and values are put together in."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tiny import llama, tokenizer
from torch import Tensor
from transformers.cache_utils import Cache

from cachetune_rag import CacheTune, ConfigError, EngineClosedError
from cachetune_rag.answering.request import Request
from cachetune_rag.model import KVBuffers, ModelAdapter
from cachetune_rag.reuse.config import ReuseConfig
from cachetune_rag.reuse.prefix_cache import KeptRows
from cachetune_rag.reuse.state import NothingReused, PrefillState
from cachetune_rag.text.prompts.prompt import Prompt

PREFIX = "You answer from the log of a lighthouse, in one word only."
CHUNKS = ["The keeper lit the lamp at dusk, as on every evening.", "The harbour master wrote a letter to the pilot."]


class Pages:
    """Memory of a server: each layer is copied away as soon as it is final, and a prompt's first rows may be there already."""

    def __init__(self, adapter: ModelAdapter, first: Cache | None = None):
        self.adapter, self.first = adapter, first
        self.layers: list[tuple[int, Tensor, Tensor]] = []
        self.kept: list[tuple[int, bool]] = []

    def take(self, ids: NDArray[np.int64], exact: int, answer_tokens: int) -> tuple[KVBuffers, int]:
        buffers = self.adapter.new_buffers(len(ids), answer_tokens)
        for rows in (*buffers.key_rows, *buffers.value_rows):
            rows.fill_(float("nan"))
        if self.first is None:
            return buffers, 0
        buffers.fill_first(exact, self.adapter.rows_of_cache(self.first, exact))
        return buffers, exact

    def layer_ready(self, buffers: KVBuffers, layer: int) -> None:
        self.layers.append((layer, buffers.keys(layer).clone(), buffers.values(layer).clone()))

    def keep(self, ids: NDArray[np.int64], exact: int, buffers: KVBuffers | None, cache: Cache) -> None:
        self.kept.append((exact, buffers is not None))

    def beginning(self, ids: NDArray[np.int64]) -> KeptRows | None:
        return None

    def forget(self) -> None:
        raise AssertionError("the weights did not change")


@pytest.fixture
def engine() -> Iterator[CacheTune]:
    with CacheTune(llama(), tokenizer()) as engine:
        yield engine


def prompt_of(engine: CacheTune) -> Prompt:
    return engine.prompts.build(query="Who lit the lamp?", chunks=CHUNKS, prefix=PREFIX)


def without_texts(prompt: Prompt) -> Prompt:
    """All that a server knows of a prompt: its tokens, and where its chunks stand."""
    return Prompt(prompt.ids, prompt.spans, prompt.chunk_ids, ("",) * len(prompt.chunk_ids))


@pytest.mark.parametrize("selector", ["expected_error", "frequency"])
def test_every_layer_is_final_when_its_owner_hears_of_it(engine: CacheTune, selector: str) -> None:
    engine.precompute(CHUNKS)
    prompt, pages = prompt_of(engine), Pages(engine.runtime.adapter)
    state = engine.runtime.assembler.reuse(
        without_texts(prompt), ReuseConfig(selector, 0.15), time.perf_counter(), pages
    )

    assert isinstance(state, PrefillState)
    assert state.report.reused > 0
    assert [layer for layer, *_ in pages.layers] == list(range(len(state.cache.layers)))
    for (_, keys, values), layer in zip(pages.layers, state.cache.layers, strict=True):
        assert torch.equal(keys, layer.keys)
        assert torch.equal(values, layer.values)
    assert pages.kept == [(prompt.spans[0].start, True)]
    usual = engine.prefill(prompt=prompt, selector=selector, ratio=0.15)
    assert torch.allclose(state.logits, usual.logits, atol=1e-5)


def test_rows_that_the_owner_has_already_are_not_computed(engine: CacheTune) -> None:
    engine.precompute(CHUNKS)
    prompt = prompt_of(engine)
    assembler, adapter, start = engine.runtime.assembler, engine.runtime.adapter, prompt.spans[0].start
    config = ReuseConfig("frequency", 0.15)
    without = assembler.reuse(prompt, config, time.perf_counter(), Pages(adapter))
    pages = Pages(adapter, first=assembler.full_prefill(prompt, time.perf_counter()).cache)
    state = assembler.reuse(prompt, config, time.perf_counter(), pages)

    assert isinstance(state, PrefillState)
    assert isinstance(without, PrefillState)
    assert (state.report.prefix_kept, without.report.prefix_kept) == (start, 0)
    assert state.report.reused == without.report.reused
    assert torch.allclose(state.logits, without.logits, atol=1e-5)


@pytest.mark.parametrize("ratio", [0.15, 1.0])
def test_without_reuse_nothing_is_computed_for_the_owner(engine: CacheTune, ratio: float) -> None:
    """Without stored chunks, and where all of the stored ones would be recomputed: the server computes the prompt itself, and is told
    which chunks were missed."""
    if ratio == 1.0:
        engine.precompute(CHUNKS)
    pages = Pages(engine.runtime.adapter)
    call = prompt_of(engine), ReuseConfig("frequency", ratio), time.perf_counter()
    tokens = sum(span.end - span.start for span in call[0].spans)

    found = engine.runtime.assembler.reuse(*call, pages)
    assert isinstance(found, NothingReused)
    assert found.missed == (() if ratio == 1.0 else tuple(range(len(CHUNKS))))
    told = found.report
    assert (told.reused, told.recomputed, told.missed) == ((0, tokens, 0) if ratio == 1.0 else (0, 0, tokens))
    assert (pages.layers, pages.kept) == ([], [])
    state = engine.runtime.assembler.prefill(*call, memory=pages)
    assert pages.kept == [(len(state.prompt.ids), False)]
    assert torch.equal(state.logits, engine.full_prefill(prompt=state.prompt).logits)


def test_a_server_reads_prompts_through_the_executor_until_the_engine_is_closed(engine: CacheTune) -> None:
    engine.precompute(CHUNKS)
    executor, opened = engine.runtime.executor, []
    request = Request.measured(prompt_of(engine), ReuseConfig("frequency", 0.15))
    pages = Pages(engine.runtime.adapter)
    state = executor.reuse(request, pages, lambda: opened.append(len(pages.layers)))

    assert isinstance(state, PrefillState)
    assert opened == [0]
    assert len(pages.layers) == len(state.cache.layers)
    assert state.report.request_id == request.id
    with pytest.raises(ConfigError, match="ReuseConfig"):
        executor.reuse(Request.measured(request.prompt, None), pages)
    engine.close()
    with pytest.raises(EngineClosedError):
        executor.reuse(request, pages)
