"""A precompute job that was stopped (Ctrl-Z, a debugger) is told of, and waited for only a while."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "store"))

from store_samples import claimed_and_stopped
from tiny import llama, tokenizer

from cachetune_rag import CacheTune, Document
from cachetune_rag.chunks import precompute

CHUNKS = ["The lighthouse was built in 1871.", "Its lamp burned whale oil until 1902."]


def test_a_job_goes_on_without_one_that_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(precompute, "STOPPED_PATIENCE", 0.05)
    with CacheTune(llama(), tokenizer(), tmp_path, lead_in="first_token") as engine:
        key = engine.runtime.assembler.key(engine.prompts.encode(CHUNKS[0]))
        with claimed_and_stopped(tmp_path, [key]) as pid, caplog.at_level(logging.WARNING):
            summary = engine.precompute([Document("a", CHUNKS)])
        assert summary.chunks == 2
        assert engine.prefill(query="When?", chunks=CHUNKS).report.missed == 0
    waiting, going_on = (record.getMessage() for record in caplog.records if record.name == precompute.__name__)
    assert f"waiting for 1 chunks, which are being computed by process {pid}" in waiting
    assert waiting.endswith("stopped")
    assert "1 chunks are computed here" in going_on
