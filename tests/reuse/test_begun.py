"""A prompt may be begun while the one before it is computed: its answer is the same, and nothing is left behind."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import llama, tokenizer

from cachetune_rag import CacheTune
from cachetune_rag.reuse.begun import Begun
from cachetune_rag.reuse.config import ReuseConfig
from cachetune_rag.reuse.layer_loader import LayerLoader
from cachetune_rag.reuse.memory import EngineMemory
from cachetune_rag.reuse.prompt_room import PromptRoom
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


def config_of(engine: CacheTune, selector: str, ratio: float = 0.2, skipped: float = 0.0) -> ReuseConfig:
    """As a server has it. Without the namespace, what was begun would be looked up anew."""
    return ReuseConfig(selector, ratio, skipped, namespace=engine.runtime.lead_ins.recent_namespace)


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
    assert begun is None or (begun.prepared is not None and state.buffers is begun.prepared.buffers)
    return state


def begin(engine: CacheTune, prompt: Prompt, config: ReuseConfig, memory: Any = None) -> Begun:
    begun = engine.runtime.assembler.begin(prompt, config, memory or engine.runtime.assembler.memory)
    assert begun is not None
    return begun


def assert_nothing_open(engine: CacheTune) -> None:
    gc.collect()
    disk = engine.store.stats().disk
    assert disk is None or disk.pinned == 0


@pytest.mark.parametrize("selector", ["expected_error", "frequency", "probe", "kv_deviation", "none"])
@pytest.mark.parametrize("skipped", [0.0, 0.1])
def test_its_keys_and_values_are_the_same(engine: CacheTune, selector: str, skipped: float) -> None:
    config = config_of(engine, selector, skipped=skipped)
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
    begun = begin(engine, prompt_of(engine, 3), config_of(engine, "frequency"))
    begun.go_on()
    begun.close()
    assert_nothing_open(engine)


def test_what_fails_as_it_is_begun_is_closed(engine: CacheTune, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device's memory may be full when the first rows are to be staged. Nobody has what was begun then, so nobody else could close it."""

    def full(_loader: LayerLoader) -> None:
        raise torch.OutOfMemoryError("no memory to stage rows in")

    closed: list[LayerLoader] = []
    close = LayerLoader.close
    monkeypatch.setattr(LayerLoader, "bring", full)
    monkeypatch.setattr(LayerLoader, "close", lambda loader: (closed.append(loader), close(loader))[1])
    with pytest.raises(torch.OutOfMemoryError):
        begin(engine, prompt_of(engine, 3), config_of(engine, "frequency"))
    assert len(closed) == 1
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


class InRoom:
    """The engine's memory, with a prompt's buffers in a part of a room. No beginnings are kept.

    Attributes:
        final: keys and values of each layer, when they were ready.
    """

    def __init__(self, engine: CacheTune, room: PromptRoom):
        self._inner, self._room = EngineMemory(engine.adapter), room
        self.final: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def take(self, ids: Any, exact: int, answer_tokens: int) -> Any:
        self._part = self._room.take(
            self._inner.bytes_for(ids, answer_tokens), self._inner.layer_bytes(ids, answer_tokens)
        )
        await_layer = partial(self._room.await_layer, self._part)
        return self._inner.take(ids, exact, answer_tokens, self._part.memory, await_layer)

    def layer_ready(self, buffers: Any, layer: int) -> None:
        self.final.append((buffers.key_rows[layer].clone(), buffers.value_rows[layer].clone()))
        if buffers.device.type == "cuda":
            torch.cuda._sleep(
                5_000_000
            )  # some ms: what the next prompt writes too early is there when the next layer is computed
        self._room.layer_done(self._part)

    def keep(self, *given: Any) -> None:
        pass  # the next prompt may have the memory already

    def close(self) -> None:
        self._room.give_back(self._part)


@pytest.mark.parametrize("tier", ["host", pytest.param("device", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("selector", ["expected_error", "frequency"])
@pytest.mark.parametrize("at_once", [2, 1], ids=["room for two", "room for one"])
def test_prompts_share_one_piece(tmp_path: Path, tier: str, selector: str, at_once: int) -> None:
    """As a server does it: what one prompt leaves is written by the next but one, on a GPU on another stream, and no other memory is taken."""
    gpu = torch.cuda.is_available()
    model = llama().cuda() if gpu else llama()
    budgets = {"host_budget": "100MB", "device_budget": "100MB" if tier == "device" else 0}
    with CacheTune(model, tokenizer(), tmp_path / "kv", **budgets) as engine:
        engine.precompute(TEXTS)
        config, prompts = config_of(engine, selector), [prompt_of(engine, seed) for seed in range(8)]
        wanted = []
        for prompt in prompts * 2:  # the second time, all is captured and in its tier
            memory = InRoom(engine, PromptRoom(engine.adapter.device))
            with closing(begin(engine, prompt, config, memory)) as alone:
                wanted.append((put_together(engine, prompt, config, alone).logits, memory.final))
        most = max(engine.adapter.buffer_bytes(len(prompt.ids)) for prompt in prompts) + (1 << 10)
        room = PromptRoom(engine.adapter.device, at_once * most)
        room.give_back(room.take(at_once * most - (1 << 10)))
        with torch.cuda.stream(torch.cuda.Stream()) if gpu else nullcontext():
            memories = [InRoom(engine, room) for _ in prompts]
            begun = [begin(engine, prompts[0], config, memories[0])]
            for number, prompt in enumerate(prompts):
                following = number + 1

                def meanwhile(following: int = following) -> None:
                    if following == len(begun) and following < len(prompts):
                        begun.append(begin(engine, prompts[following], config, memories[following]))
                    elif following < len(begun):
                        begun[following].go_on()

                state = put_together(engine, prompt, config, begun[number], meanwhile)
                meanwhile()  # if the device was done too soon
                logits, rows = wanted[8 + number]
                assert torch.allclose(state.logits, logits, atol=1e-5)
                for found, expected in zip(memories[number].final, rows, strict=True):
                    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True))
                begun[number].close()
                memories[number].close()
        assert (room.parts, room.size <= at_once * most) == (0, True)
        assert len(begun) == len(prompts)
        assert_nothing_open(engine)


@pytest.mark.gpu
@pytest.mark.parametrize("tier", ["device", "host"])
@pytest.mark.parametrize("selector", ["expected_error", "frequency"])
def test_prompts_one_behind_the_other_on_a_gpu(tmp_path: Path, tier: str, selector: str) -> None:
    """Each prompt is begun while the one before it is computed, on a stream of their own as inside a server."""
    model = llama().cuda()
    budgets = {"host_budget": "100MB", "device_budget": "100MB" if tier == "device" else 0}
    with CacheTune(model, tokenizer(), tmp_path / "kv", cuda_kernels=True, **budgets) as engine:
        engine.precompute(TEXTS)
        config, prompts = config_of(engine, selector), [prompt_of(engine, seed) for seed in range(8)]
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
