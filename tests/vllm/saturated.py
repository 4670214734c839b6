"""A worker with many prompts on a tiny model, whose GPU takes a while for each, without vLLM's engine."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cachetune_rag import CacheTune
from cachetune_rag.model import KVBuffers
from cachetune_rag.model.heads import ALL_HEADS
from cachetune_rag.reuse.prompt_room import PromptRoom
from cachetune_vllm.messages import Load, ToWorkers
from cachetune_vllm.pace import OwnPace
from cachetune_vllm.pages import Pages
from cachetune_vllm.worker import ReuseWorker

PAGE, PAGES = 8, 1000
TEXTS = [f"Ship {n} came in at noon with {n * 7} barrels of salt, and left before the storm." for n in range(8)]


class Meanwhile:
    """A prompt's memory; when the prompt is computed, the device takes a while for it, in which others are begun."""

    def __init__(self, memory: Any, meanwhile: Callable[[], None]):
        self._memory, self._meanwhile = memory, meanwhile

    def __getattr__(self, name: str) -> Any:
        return getattr(self._memory, name)

    def keep(self, *given: Any) -> None:
        for _ in range(3):
            self._meanwhile()
        self._memory.keep(*given)


class OnDevice:
    """An engine whose prompts take a while."""

    def __init__(self, runtime: Any):
        self._runtime, self.executor = runtime, self

    def __getattr__(self, name: str) -> Any:
        runtime = self._runtime
        return getattr(runtime if hasattr(runtime, name) else runtime.executor, name)

    def reuse(self, request: Any, memory: Any, wanted: Any, begun: Any, meanwhile: Any, *others: Any) -> Any:
        given = Meanwhile(memory, meanwhile)
        return self._runtime.executor.reuse(request, given, wanted, begun, meanwhile, *others)


class Saturated:
    """A worker with many prompts.

    Attributes:
        room: the memory of prompts.
        alive: numbers of the buffers that are there.
        most: the most of these at once, and of the prompts that had memory.
        begun: how many prompts got their buffers beside another one.
        full: a layer of this page has no memory.
    """

    def __init__(self, engine: CacheTune, patch: pytest.MonkeyPatch, most: int | None = None, readable: bool = True):
        self.engine, self.room = engine, PromptRoom(torch.device("cpu"), most)
        self.alive: set[int] = set()
        self.most, self.begun, self.full = (0, 0), 0, -1
        layers: Any = [
            SimpleNamespace(
                impl=SimpleNamespace(do_kv_cache_update=self._write),
                kv_cache=torch.zeros(PAGES, spec.heads, PAGE, spec.head_dim + spec.v_head_dim),
            )
            for spec in engine.adapter.layers
        ]
        pages = Pages(layers, PAGE, PAGES)
        assert pages.learn_to_read(engine.adapter.new_buffers(PAGE))
        pages.readable = readable
        self._layers = layers
        made: Any = OnDevice(engine.runtime)
        self.worker = ReuseWorker(
            lambda tenant: made, pages, torch.device("cpu"), ALL_HEADS, OwnPace(apart=True), engine.runtime.model.lock, self.room
        )  # fmt: skip
        make, count = KVBuffers.__init__, iter(range(1000))

        def note(buffers: KVBuffers, *args: Any, **kwargs: Any) -> None:
            make(buffers, *args, **kwargs)
            self.alive.add(number := next(count))
            weakref.finalize(buffers, self.alive.discard, number)
            self.most = max(self.most[0], len(self.alive)), max(self.most[1], self.room.parts)
            self.begun += len(self.alive) == 2

        patch.setattr(KVBuffers, "__init__", note)

    def _write(self, attention: Any, keys: Any, values: Any, pages: torch.Tensor, slots: torch.Tensor) -> None:
        if self.full in slots // PAGE:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 56.00 MiB.")
        pages[slots // PAGE, :, slots % PAGE] = torch.cat((keys, values), -1)

    def load(self, number: int, selector: str, first: int | None = None) -> Load:
        """A prompt of about 360 tokens."""
        chunks = random.Random(number).sample(TEXTS, 4)
        prompt = self.engine.prompts.build(query=f"How many, {number}?", chunks=chunks, prefix="The log.")
        count = -(-len(prompt.ids) // PAGE)
        start = 1 + 60 * number if first is None else first
        return Load(
            f"r{number}", prompt, selector, 0.15, "", tuple(range(start, start + count)), 0, len(prompt.ids) - 1, 0
        )

    def ask(self, loads: list[Load], given_up: frozenset[str] = frozenset()) -> dict[str, dict[str, Any]]:
        """All reports, once all are done."""
        done: set[str] = set()
        reports: dict[str, dict[str, Any]] = {}
        gc.disable()
        try:
            self.worker.start(ToWorkers(tuple(loads), idle=True))
            self.worker.start(ToWorkers(given_up=given_up, idle=True))
            while len(done) < len(loads):
                done |= self.worker.finished(idle=True)
            told = self.worker.report()
            assert told is not None
            reports.update(told.reports)
            assert (self.alive, self.room.parts) == (set(), 0)  # although Python's collector did not run
        finally:
            gc.enable()
        return reports

    def written(self, load: Load) -> list[torch.Tensor]:
        """The rows of a prompt in the pages, layer by layer."""
        return [layer.kv_cache[list(load.blocks)].clone() for layer in self._layers]
