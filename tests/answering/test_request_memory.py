"""What a request held is free as soon as nobody has its answer: gigabytes that don't wait for Python's garbage collector."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
from tiny import llama, tokenizer
from transformers.cache_utils import DynamicCache

from cachetune_rag import CacheTune, Document
from cachetune_rag.model import KVBuffers

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


@pytest.mark.parametrize("chunks", [STORED, [*STORED, MISSED], []], ids=["stored", "one missed", "none"])
@pytest.mark.parametrize("way", WAYS)
def test_nothing_of_a_request_waits_for_the_collector(
    way: str, chunks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[Any]] = []

    def note(kind: Any) -> None:
        init = kind.__init__

        def noted(self: Any, *args: Any, **kwargs: Any) -> None:
            init(self, *args, **kwargs)
            made.append(weakref.ref(self))

        monkeypatch.setattr(kind, "__init__", noted)

    with CacheTune(llama(), tokenizer(), None, batch_tokens=0, lead_in=LEADS) as engine:
        engine.precompute([Document("a", STORED)])
        note(KVBuffers)
        note(DynamicCache)
        gc.collect()
        gc.disable()
        try:
            for selector in ("frequency", "probe", "expected_error"):
                WAYS[way](engine, chunks, {"ratio": 0.3, "selector": selector})
            assert engine.flush(60)
            engine.runtime.assembler.forget()  # the beginnings that are kept for prompts to come
            assert len(made) >= 3
            assert [type(thing()).__name__ for thing in made if thing() is not None] == []
        finally:
            gc.enable()
