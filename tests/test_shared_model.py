"""Engines on a model that others use and change: what they refuse, and how they go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import llama, tokenizer

from cachetune_rag import CacheTune, ConfigError, Document, ModelChangedError, UnsupportedModelError
from cachetune_rag.model.private import check_modules, sdpa_is_right, version_of

TEXTS = ["The lighthouse was built in 1871.", "Visitors climb two hundred steps.", "The lamp turns in any weather."]


def engine_on(model: Any, store: Path | None = None) -> CacheTune:
    return CacheTune(model, tokenizer(), store, lead_in="first_token")


def _in_place(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.add_(0.3)


def _data(model: Any) -> None:
    model.model.layers[0].self_attn.v_proj.weight.data += 0.3


def _replaced(model: Any) -> None:
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight * 2)


def _wrapped(model: Any) -> None:
    model.model.layers[1].mlp.up_proj = torch.nn.Sequential(model.model.layers[1].mlp.up_proj)


@pytest.mark.parametrize("change", [_in_place, _data, _replaced, _wrapped])
def test_changed_weights_are_refused_until_the_engine_is_told(tmp_path: Path, change: Callable[[Any], None]) -> None:
    model = llama()
    with engine_on(model, tmp_path / "kv") as engine:
        engine.precompute([Document("a", TEXTS[:2])])
        change(model)
        with pytest.raises(ModelChangedError, match="model_changed"):
            engine.generate("?", TEXTS[:2], max_new_tokens=1)
        with pytest.raises(ModelChangedError):
            engine.precompute([Document("b", TEXTS[2:])])
        engine.model_changed()
        answer = engine.prefill("?", TEXTS[:2], ratio=1.0)
        assert torch.allclose(answer.logits, engine.full_prefill("?", TEXTS[:2]).logits, atol=1e-4)
    with engine_on(llama(), tmp_path / "kv") as original:
        report = original.prefill("?", TEXTS, ratio=0.0, selector="none").report
        assert report.missed == len(TEXTS[2]), "only what the original weights made is found"


def test_two_engines_have_one_lock_and_the_model_stays_as_it_is() -> None:
    model = llama().train()
    with engine_on(model) as a, engine_on(model) as b:
        assert a._lock is b._lock
        assert a.adapter is b.adapter
        assert model.training
        assert not a.adapter.view.training


@contextmanager
def _dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "setting",
    [_dtype, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16), lambda: torch.device("meta")],
    ids=["default dtype", "inference mode", "autocast", "default device"],
)
def test_settings_of_torch_change_no_answer(setting: Callable[[], Any]) -> None:
    def ask(stack: ExitStack | None) -> tuple[torch.Tensor, tuple[int, ...]]:
        model = llama()
        if stack is not None:
            stack.enter_context(setting())
        with CacheTune(model, tokenizer(), None, lead_in=[[1, *range(40, 60)], [1, *range(80, 100)]]) as engine:
            engine.precompute([Document("a", TEXTS)])
            logits = engine.prefill("?", TEXTS, ratio=0.3).logits
            return logits, engine.generate("?", TEXTS, ratio=0.3, max_new_tokens=4).token_ids

    wanted, tokens = ask(None)
    with ExitStack() as stack:
        found, answer = ask(stack)
    assert answer == tokens
    assert torch.equal(found, wanted)


def test_weights_that_are_no_numbers_are_refused_by_name() -> None:
    model = llama()
    model.lm_head.weight.data[3, 4] = float("nan")
    with pytest.raises(UnsupportedModelError, match=r"lm_head.weight.*\[3, 4\]"):
        engine_on(model)


def test_a_tokenizer_larger_than_the_embedding_is_refused_with_both_numbers() -> None:
    import copy

    larger = copy.deepcopy(tokenizer())
    larger.add_special_tokens({"pad_token": "<pad>"})
    CacheTune(llama(), larger, None, lead_in="first_token").close()
    larger.add_tokens(["lighthouse"])
    with pytest.raises(ConfigError, match=r"263.*261"):
        CacheTune(llama(), larger, None)


def test_this_release_has_the_private_names() -> None:
    check_modules()
    model = llama()
    assert sdpa_is_right(model), "transformers renamed _supports_sdpa"
    assert version_of(torch.zeros(1)) == 0, "torch renamed Tensor._version"
    assert hasattr(torch.nn.Module, "_compiled_call_impl"), "torch renamed Module._compiled_call_impl"
    assert hasattr(torch, "_foreach_copy_"), "torch renamed _foreach_copy_"
