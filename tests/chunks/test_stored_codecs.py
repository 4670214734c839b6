"""An engine that is made ready is so for chunks in all codecs that its store has."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from tiny import llama, tokenizer

from cachetune_rag import CacheTune, runtime
from cachetune_rag.chunks.stored_codecs import SAMPLE, stored_codecs
from cachetune_store import ChunkStore, StorePathError

TEXT = "Ship {} came in at noon with many barrels of salt, and left again before the storm."


def filled(folder: Path, codecs: dict[str, list[str]], **options: Any) -> None:
    for codec, texts in codecs.items():
        with CacheTune(llama(), tokenizer(), folder, codec=codec, **options) as engine:
            for text in texts:
                engine.precompute([text])


def made_ready(engine: CacheTune, patch: pytest.MonkeyPatch) -> list[str]:
    """The codecs whose kernels an engine compiles, if its kernels ran here."""
    compiled: list[str] = []
    patch.setattr(runtime, "warm_up_loading", lambda adapter, codec: compiled.append(codec))
    patch.setattr(engine.adapter, "cuda_kernels", True)
    engine.warmup()
    return compiled


def test_kernels_are_compiled_for_what_is_stored_and_for_what_will_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(tmp_path, {"int4": [TEXT.format(1)], "int8": [TEXT.format(2)]})
    filled(tmp_path, {"fp8": [TEXT.format(3)]}, tenant="another")
    with CacheTune(llama(), tokenizer(), tmp_path) as engine:
        assert made_ready(engine, monkeypatch) == ["exact", "int4", "int8"]


def test_an_engine_is_made_ready_although_its_disk_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(*_: Any, **__: Any) -> Any:
        raise StorePathError("the disk is gone")

    with CacheTune(llama(), tokenizer(), tmp_path) as engine, monkeypatch.context() as patch:
        patch.setattr(engine.store, "sample_documents", failing)
        with caplog.at_level(logging.WARNING):
            assert made_ready(engine, patch) == ["exact"]
    assert "the first request with chunks in another codec than exact waits" in caplog.text
    assert "the disk is gone" in caplog.text


def test_of_many_documents_few_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with CacheTune(llama(), tokenizer(), tmp_path) as engine:
        assert stored_codecs(engine.store, "") == set()
        key = engine.runtime.assembler.key(tokenizer()(TEXT.format(1), add_special_tokens=False).input_ids)
        engine.precompute([TEXT.format(1)])
        missing = engine.runtime.assembler.key([1, 2, 3])
        with ChunkStore(tmp_path) as store:
            for number in range(3 * SAMPLE + 1):
                store.set_document(f"d{number}", [missing, key])
            opened: list[object] = []
            real = store.open
            monkeypatch.setattr(store, "open", lambda key: opened.append(key) or real(key))
            # A store may have millions of chunks, and each look at a file may have to wait for the disk.
            monkeypatch.setattr(store.tier("disk"), "size_of", None)
            assert stored_codecs(store, "") == {"exact"}
            assert opened.count(key) <= SAMPLE
            assert opened.count(missing) >= SAMPLE // 2
