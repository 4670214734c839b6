"""On a store that may only be read, long work is refused before it begins, not at its end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tiny import llama, tokenizer

from cachetune_rag import CacheTune, Document, StoreReadOnlyError

TEXT = "The lighthouse was built in 1871, by hand."
SAMPLE = {"query": "Who?", "chunks": [TEXT]}


@pytest.mark.parametrize(
    "work",
    [
        lambda engine, told: engine.calibrate([SAMPLE], progress=told),
        lambda engine, told: engine.tune([SAMPLE], progress=told),
        lambda engine, told: engine.precompute([Document("d", [TEXT])], progress=told),
    ],
    ids=["calibrate", "tune", "precompute"],
)
def test_it_is_refused_before_the_model_runs(
    work: Callable[[CacheTune, Any], object], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with CacheTune(llama(), tokenizer(), tmp_path, lead_in="first_token") as engine:
        engine.precompute(Document("e", [TEXT]))
    refused = OSError(30, "Read-only file system")
    monkeypatch.setattr("cachetune_store.directory._refusal", lambda path: refused)
    with CacheTune(llama(), tokenizer(), tmp_path, lead_in="first_token") as engine:
        assert engine.store.read_only
        for name in ("prefill", "full_prefill"):
            monkeypatch.setattr(engine.runtime.assembler, name, lambda *_: pytest.fail("the model ran"))
        monkeypatch.setattr(engine.runtime.chunk_computer, "compute", lambda *_: pytest.fail("the model ran"))
        with pytest.raises(StoreReadOnlyError):
            work(engine, lambda progress: None)
