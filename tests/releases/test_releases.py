"""Stores that released versions made (`data/VERSION`) open in this one, and give the answers that they gave then."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from make_store import CALIBRATED, CODECS, DATA, QUERY, SELECTOR, TENANT, ask
from safetensors.torch import load_file

from cachetune_rag import CacheTune, Document
from cachetune_rag.measuring.tuning.saved import SavedTunings
from cachetune_rag.model.loading import load_model
from cachetune_store import ChunkStore


@dataclass(frozen=True)
class Release:
    """What a release left."""

    folder: Path
    store: Path
    expected: dict[str, Any]
    model: Any
    tokenizer: Any

    def engine(self, **options: Any) -> CacheTune:
        return CacheTune(self.model, self.tokenizer, self.store, host_budget=0, **options)


@pytest.fixture(params=sorted(path.name for path in DATA.iterdir()))
def release(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Release:
    folder = DATA / request.param
    expected = json.loads((folder / "expected.json").read_text())
    store = Path(shutil.copytree(folder / "kv", tmp_path / "kv"))
    model, tokenizer = load_model(folder / "model", device="cpu")
    if expected["transformers"] != transformers.__version__:
        # Another release of transformers may describe the same model otherwise; then its chunks are rightly left alone.
        with ChunkStore(store) as opened:
            made = opened.groups()[0].namespace
        monkeypatch.setattr("cachetune_rag.model.shared.model_fingerprint", lambda _: made.model)
        monkeypatch.setattr("cachetune_rag.runtime.tokenizer_fingerprint", lambda _: made.tokenizer)
    monkeypatch.setattr(SavedTunings, "hardware", expected["hardware"])
    return Release(folder, store, expected, model, tokenizer)


def test_answers_are_those_of_then(release: Release) -> None:
    wanted = load_file(release.folder / "logits.safetensors")
    found: dict[str, Any] = {}
    logits: dict[str, torch.Tensor] = {}
    for tenant in ("", TENANT):
        with release.engine(tenant=tenant) as engine:
            names = [info.id for info in engine.store.documents(tenant=tenant)]
            found |= ask(engine, {name: release.expected["documents"][name] for name in names}, logits)
    assert all(answer["missed"] == 0 for by_selector in found.values() for answer in by_selector.values())
    assert found == release.expected["answers"]
    assert logits.keys() == wanted.keys()
    for name, values in logits.items():
        torch.testing.assert_close(
            values, wanted[name], rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_all_of_it_is_in_order(release: Release) -> None:
    expected = release.expected
    with ChunkStore(release.store) as store:
        # The index came along, and was not made anew.
        assert store.stats().lifetime["disk"].bytes_written == expected["bytes_written"]
        _check_content(store, expected)
        report = store.verify()
        assert (report.ok, report.checked, report.bytes) == (True, expected["chunks"], expected["bytes"])
        assert (report.foreign, report.adopted, report.dropped, report.temp_files) == (0, 0, 0, 0)


def test_the_index_can_be_lost(release: Release) -> None:
    shutil.rmtree(release.store / "index")
    with ChunkStore(release.store) as store:
        _check_content(store, release.expected)
        assert store.verify().ok


def _check_content(store: ChunkStore, expected: dict[str, Any]) -> None:
    stats = store.stats()
    assert stats.disk is not None
    assert (stats.disk.chunks, stats.disk.bytes) == (expected["chunks"], expected["bytes"])
    documents = {info.id: info for tenant in ("", TENANT) for info in store.documents(tenant=tenant)}
    assert documents.keys() == expected["documents"].keys()
    texts = {key: text for key, text, _ in store.texts()}
    for name, chunks in expected["documents"].items():
        assert [texts[key] for key in documents[name].chunks] == chunks
        assert documents[name].stored == len(chunks)
    assert {each.tenant: each.documents for each in store.tenants()} == {"": 4, TENANT: 1}
    assert {group.codec for group in store.groups()} == set(CODECS)


def test_it_is_gone_on_with(release: Release) -> None:
    """The lead-ins stand, so nothing is computed again; passages are recognised; measured ratios hold."""
    expected = release.expected
    with release.engine(codec=CALIBRATED) as engine:
        assert [list(lead) for lead in engine.namespace.lead_ins] == expected["lead_ins"]
        mine = {name: chunks for name, chunks in expected["documents"].items() if name != TENANT}
        summary = engine.precompute(Document(name, chunks) for name, chunks in mine.items())
        assert (summary.chunks, summary.skipped) == (0, sum(map(len, mine.values())))
        text = f"Read this. {mine['exact'][0]} And this. {expected['documents'][TENANT][0]} {QUERY}"
        assert engine.prompt_from_text(text).recognised == 1  # the other is another tenant's
        assert engine.calibrated_ratio(SELECTOR) == expected["calibrated"]
        chunks = mine[CALIBRATED]
        report = engine.prefill(query=QUERY, chunks=chunks, prefix="", ratio="auto", selector=SELECTOR).report
        assert report.ratio == pytest.approx(expected["tuned"]["ratio"])
