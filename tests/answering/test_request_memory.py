"""What a request held is free as soon as nobody has its answer: gigabytes that don't wait for Python's garbage collector."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import llama, tokenizer
from transformers.cache_utils import DynamicCache

from cachetune_rag import CacheTune, Document
from cachetune_rag.model import KVBuffers
from cachetune_rag.reuse.layer_loader import LayerLoader
from cachetune_store import ChunkReader

STORED = [
    "The lighthouse was built in 1871 by three brothers.",
    "Visitors climb 214 steps; the last forty are a ladder.",
]
MISSED = "The lamp turns in any weather."
LEADS = [[1, 40, 41, 42, 43], [1, 70, 71], [1, 90, 12, 13]]


def _dropped(engine: CacheTune, chunks: list[str], options: Any) -> None:
    stream = engine.stream("How many?", chunks, max_new_tokens=4, eos_token_id=[], **options)
    next(stream)


WAYS: dict[str, Callable[[CacheTune, list[str], Any], Any]] = {
    "prefill": lambda engine, chunks, options: engine.prefill("How many?", chunks, **options),
    "generate": lambda engine, chunks, options: engine.generate("How many?", chunks, max_new_tokens=3, **options),
    "dropped stream": _dropped,
    "full prefill": lambda engine, chunks, _: engine.full_prefill("How many?", chunks),
    "generate in full": lambda engine, chunks, _: engine.generate("How many?", chunks, reuse=False, max_new_tokens=3),
}


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Any]]:
    """Every key-value memory, cache, loader and reader that is made while a test runs."""
    found: list[weakref.ref[Any]] = []

    def note(kind: Any) -> None:
        init = kind.__init__

        def noted(self: Any, *args: Any, **kwargs: Any) -> None:
            init(self, *args, **kwargs)
            found.append(weakref.ref(self))

        monkeypatch.setattr(kind, "__init__", noted)

    for kind in (KVBuffers, DynamicCache, LayerLoader, ChunkReader):
        note(kind)
    return found


def _left(made: list[weakref.ref[Any]]) -> list[str]:
    return [type(thing()).__name__ for thing in made if thing() is not None]


@pytest.mark.parametrize("chunks", [STORED, [*STORED, MISSED], []], ids=["stored", "one missed", "none"])
@pytest.mark.parametrize("way", WAYS)
def test_nothing_of_a_request_waits_for_the_collector(
    way: str, chunks: list[str], made: list[weakref.ref[Any]]
) -> None:
    with CacheTune(llama(), tokenizer(), None, batch_tokens=0, lead_in=LEADS) as engine:
        engine.precompute([Document("a", STORED)])
        gc.collect()
        made.clear()
        gc.disable()
        try:
            for selector in ("frequency", "probe", "expected_error"):
                WAYS[way](engine, chunks, {"ratio": 0.3, "selector": selector})
            assert engine.flush(60)
            engine.runtime.assembler.forget()  # the beginnings that are kept for prompts to come
            assert len(made) >= 3
            assert _left(made) == []
        finally:
            gc.enable()


@pytest.mark.parametrize("selector", ["frequency", "expected_error"])
def test_nothing_of_an_attempt_that_failed_waits_for_the_collector(
    selector: str, tmp_path: Path, made: list[weakref.ref[Any]]
) -> None:
    """A prompt whose chunks turn out to be damaged while they are read is put together again, without them."""
    with CacheTune(llama(), tokenizer(), tmp_path, batch_tokens=0, lead_in=LEADS, host_budget=0) as engine:
        engine.precompute([Document("a", STORED)])
        for file in tmp_path.rglob("*.safetensors"):
            content = bytearray(file.read_bytes())
            content[len(content) // 2 :: 97] = bytes(255 - byte for byte in content[len(content) // 2 :: 97])
            file.write_bytes(content)
        gc.collect()
        made.clear()
        gc.disable()
        try:
            report = engine.generate("How many?", STORED, max_new_tokens=3, ratio=0.3, selector=selector).report
            assert report.damaged == len(STORED)
            assert engine.flush(60)
            engine.runtime.assembler.forget()
            assert len(made) > 4
            assert _left(made) == []
        finally:
            gc.enable()
