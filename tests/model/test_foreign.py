"""Models with layers whose weights somebody else keeps: an engine on one does what an engine on the whole model does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cachetune_rag import CacheTune, Document, ModelChangedError, UnsupportedModelError
from cachetune_rag.model import ModelAdapter
from cachetune_rag.model.loaded.fingerprint import model_fingerprint
from cachetune_rag.model.loaded.foreign import ForeignLinear
from cachetune_rag.runtime import Runtime
from tests import tiny

TEXTS = [
    "the first passage of some length",
    "and the second, which says other things",
    "a third one about nothing at all",
]


class Elsewhere(ForeignLinear):
    """A layer over a matrix that isn't in the model."""

    def __init__(self, linear: nn.Linear):
        super().__init__(linear.in_features, linear.out_features)
        self._multiply = [linear]  # in a list: no part of the model

    @property
    def weight(self) -> Tensor:
        return self._multiply[0].weight.detach()

    def forward(self, states: Tensor) -> Tensor:
        return self._multiply[0](states)


def foreign(seed: int = 0) -> Any:
    model = tiny.llama(seed)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, Elsewhere(module))
    return model


@torch.no_grad()
def test_an_engine_that_is_told_the_fingerprint_finds_and_gives_what_one_on_the_whole_model_does(
    tmp_path: Path,
) -> None:
    whole = tiny.llama()
    with CacheTune(whole, tiny.tokenizer(), tmp_path) as engine:
        engine.precompute(Document("d", TEXTS))
        wanted = engine.prefill(query="what?", chunks=TEXTS[::-1], ratio=0.2)
        share = engine.adapter.fresh_layers(1)
        grams = engine.adapter.value_grams
    runtime = Runtime(foreign(), tiny.tokenizer(), tmp_path, fingerprint=model_fingerprint(whole))
    try:
        config = runtime.admission.config("auto", 0.2)
        request = runtime.admission.for_prefill("what?", TEXTS[::-1], None, None, {}, config=config, started=0.0)
        found = runtime.executor.read(request)
        assert found.report.missed == 0
        assert found.report.reused == wanted.report.reused
        assert found.report.reused > 0
        torch.testing.assert_close(found.logits, wanted.logits, atol=1e-5, rtol=0)
        assert runtime.adapter.fresh_layers(1) == pytest.approx(share)
        for ours, theirs in zip(runtime.adapter.value_grams, grams, strict=True):
            torch.testing.assert_close(ours, theirs)
    finally:
        runtime.close()


def test_without_its_fingerprint_no_engine_is_made() -> None:
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.0\.self_attn\.q_proj.*fingerprint"):
        CacheTune(foreign(), tiny.tokenizer())


@torch.no_grad()
def test_changed_weights_need_a_new_engine() -> None:
    model = foreign()
    runtime = Runtime(model, tiny.tokenizer(), fingerprint="0" * 64)
    try:
        model.model.norm.weight.add_(1)
        with pytest.raises(ModelChangedError, match="make a new one with the fingerprint of the new weights"):
            runtime.model_changed()
        with runtime.model.lock, pytest.raises(ModelChangedError, match=r"model\.norm\.weight was changed in place"):
            runtime.model.check()
    finally:
        runtime.close()


def test_the_adapter_needs_no_weights_to_find_where_keys_are_read() -> None:
    assert [tap.key_module for tap in ModelAdapter(foreign()).taps] == ["k_proj"] * 3
