"""A prompt may be begun while the one before it is computed: its answer is the same, and nothing is left behind."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tiny import llama, tokenizer

from cachetune_rag import CacheTune
from cachetune_rag.reuse.begun import Begun
from cachetune_rag.reuse.config import ReuseConfig
from cachetune_rag.reuse.state import NothingReused, PrefillState
from cachetune_rag.text.prompts.prompt import Prompt

TEXTS = [
    f"Ship {number} came in at noon with {number * 7} barrels of salt, and left before the storm."
    for number in range(8)
]


@pytest.fixture(params=["memory", "disk and memory"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[CacheTune]:
    with CacheTune(llama(), tokenizer(), None if request.param == "memory" else tmp_path / "kv") as engine:
        engine.precompute(TEXTS)
        yield engine


def prompt_of(engine: CacheTune, seed: int) -> Prompt:
    chunks = random.Random(seed).sample(TEXTS, 4)
    return engine.prompts.build(query=f"How many barrels, {seed}?", chunks=chunks, prefix="The harbour's log.")


def put_together(
    engine: CacheTune,
    prompt: Prompt,
    config: ReuseConfig,
    begun: Begun | None = None,
    meanwhile: Callable[[], None] | None = None,
) -> PrefillState:
    assembler = engine.runtime.assembler
    memory = assembler.memory if begun is None else begun.memory
    state = assembler.reuse(prompt, config, time.perf_counter(), memory, begun=begun, meanwhile=meanwhile)
    assert isinstance(state, PrefillState)
    return state


def begin(engine: CacheTune, prompt: Prompt, config: ReuseConfig) -> Begun:
    begun = engine.runtime.assembler.begin(prompt, config, engine.runtime.assembler.memory)
    assert begun is not None
    return begun


def assert_nothing_open(engine: CacheTune) -> None:
    gc.collect()
    disk = engine.store.stats().disk
    assert disk is None or disk.pinned == 0


@pytest.mark.parametrize("selector", ["expected_error", "frequency", "probe", "kv_deviation", "none"])
@pytest.mark.parametrize("skipped", [0.0, 0.1])
def test_its_keys_and_values_are_the_same(engine: CacheTune, selector: str, skipped: float) -> None:
    config = ReuseConfig(selector, 0.2, skipped)
    first, second = prompt_of(engine, 1), prompt_of(engine, 2)
    put_together(engine, first, config)  # from here on the prompts' common beginning is kept
    wanted = put_together(engine, second, config)
    begun = begin(engine, second, config)
    put_together(engine, first, config)
    begun.go_on()
    state = put_together(engine, second, config, begun)
    begun.close()
    assert torch.equal(state.logits, wanted.logits)
    for mine, theirs in zip(state.cache.layers, wanted.cache.layers, strict=True):
        assert torch.equal(mine.keys, theirs.keys)
        assert torch.equal(mine.values, theirs.values)
    for name in ("reused", "recomputed", "missed", "skipped", "probed", "bytes_read"):
        assert getattr(state.report, name) == getattr(wanted.report, name)
    assert_nothing_open(engine)


def test_what_is_begun_and_given_up_is_closed(engine: CacheTune) -> None:
    begun = begin(engine, prompt_of(engine, 3), ReuseConfig("frequency", 0.1))
    begun.go_on()
    begun.close()
    assert_nothing_open(engine)


def test_a_prompt_is_not_begun_where_a_chunk_must_be_read(tmp_path: Path) -> None:
    """The prompt that is being computed would wait for the disk."""
    config = ReuseConfig("frequency", 0.2)
    with CacheTune(llama(), tokenizer(), tmp_path / "kv", host_budget=0) as engine:
        engine.precompute(TEXTS)
        assert engine.runtime.assembler.begin(prompt_of(engine, 4), config, engine.runtime.assembler.memory) is None
        assert_nothing_open(engine)


def test_with_new_weights_it_is_looked_up_anew(tmp_path: Path) -> None:
    model = llama()
    with CacheTune(model, tokenizer()) as engine:
        engine.precompute(TEXTS)
        prompt, namespace = prompt_of(engine, 5), engine.runtime.lead_ins.recent_namespace
        begun = begin(engine, prompt, ReuseConfig("frequency", 0.2, namespace=namespace))
        with torch.no_grad():
            model.lm_head.weight.mul_(2)
        engine.model_changed()
        config = ReuseConfig("frequency", 0.2, namespace=namespace)
        state = engine.runtime.assembler.reuse(prompt, config, time.perf_counter(), begun.memory, begun=begun)
        begun.close()
        assert isinstance(state, NothingReused)
        assert (state.report.reused, state.report.missed > 0) == (0, True)


@pytest.mark.gpu
@pytest.mark.parametrize("tier", ["device", "host"])
@pytest.mark.parametrize("selector", ["expected_error", "frequency"])
def test_prompts_one_behind_the_other_on_a_gpu(tmp_path: Path, tier: str, selector: str) -> None:
    """Each prompt is begun while the one before it is computed, on a stream of their own as inside a server."""
    config, model = ReuseConfig(selector, 0.2), llama().cuda()
    budgets = {"host_budget": "100MB", "device_budget": "100MB" if tier == "device" else 0}
    with CacheTune(model, tokenizer(), tmp_path / "kv", cuda_kernels=True, **budgets) as engine:
        engine.precompute(TEXTS)
        prompts = [prompt_of(engine, seed) for seed in range(8)]
        for prompt in prompts:  # warm: graphs are captured, chunks are in their tiers, the common beginning is kept
            put_together(engine, prompt, config)
        wanted = [put_together(engine, prompt, config).logits for prompt in prompts]
        with torch.cuda.stream(torch.cuda.Stream()):
            begun: list[Begun] = []

            def meanwhile() -> None:
                if len(begun) <= number and number + 1 < len(prompts):
                    begun.append(begin(engine, prompts[number + 1], config))
                elif len(begun) > number:
                    begun[number].go_on()

            for number, prompt in enumerate(prompts):
                if number == len(begun) + 1:  # the one before was done too soon
                    begun.append(begin(engine, prompt, config))
                state = put_together(engine, prompt, config, begun[number - 1] if number else None, meanwhile)
                assert torch.allclose(state.logits, wanted[number], atol=1e-5)
        for each in begun:
            each.close()
        assert_nothing_open(engine)
