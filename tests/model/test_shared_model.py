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
from cachetune_rag.model.libraries.private import check_modules, sdpa_is_right, version_of
from cachetune_rag.model.loaded import changes

TEXTS = ["The lighthouse was built in 1871.", "Visitors climb two hundred steps.", "The lamp turns in any weather."]


def engine_on(model: Any, store: Path | None = None) -> CacheTune:
    return CacheTune(model, tokenizer(), store, lead_in="first_token")


def _in_place(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.add_(0.3)


def _data(model: Any) -> None:
    model.model.layers[0].self_attn.v_proj.weight.data += 0.3


def _loaded(model: Any) -> None:
    model.load_state_dict({name: value * 1.01 for name, value in model.state_dict().items()})


def _replaced(model: Any) -> None:
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight * 2)


def _wrapped(model: Any) -> None:
    model.model.layers[1].mlp.up_proj = torch.nn.Sequential(model.model.layers[1].mlp.up_proj)


@pytest.mark.parametrize("change", [_in_place, _data, _loaded, _replaced, _wrapped])
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
        assert a.runtime.model.lock is b.runtime.model.lock
        assert a.adapter is b.adapter
        assert model.training
        assert not a.adapter.view.training


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.train(),
        lambda model: model.requires_grad_(False),
        lambda model: model.set_attn_implementation("eager"),
        lambda model: (model.gradient_checkpointing_enable(), model.gradient_checkpointing_disable()),
        lambda model: model.gradient_checkpointing_enable(),
        lambda model: model.generation_config.update(temperature=0.3, do_sample=True, max_new_tokens=5),
        lambda model: model.to("cpu", torch.float32),
        lambda model: (model(torch.arange(5)[None]), model.state_dict()),
    ],
    ids=["train", "requires_grad", "attention", "checkpointing", "checkpointing on", "generation", "to itself", "used"],
)
def test_what_changes_no_number_is_no_change(tmp_path: Path, change: Callable[[Any], Any]) -> None:
    model = llama()
    with engine_on(model, tmp_path / "kv") as engine:
        engine.precompute([Document("a", TEXTS)])
        wanted = engine.prefill("?", TEXTS, ratio=0.3).logits
        change(model)
        assert torch.allclose(engine.prefill("?", TEXTS, ratio=0.3).logits, wanted, atol=1e-5)
        assert not engine.model_changed()
        assert engine.prefill("?", TEXTS).report.missed == 0
    with engine_on(model, tmp_path / "kv") as later:
        assert later.prefill("?", TEXTS).report.missed == 0


@pytest.mark.parametrize(
    "setting",
    [{"return_dict": False}, {"output_hidden_states": True}, {"use_cache": False}],
    ids=lambda s: next(iter(s)),
)
def test_what_the_callers_forwards_return_is_the_callers_choice(setting: dict[str, bool]) -> None:
    model = llama()
    with engine_on(llama()) as engine:
        wanted = engine.generate("?", TEXTS, max_new_tokens=3).token_ids
    for name, value in setting.items():
        setattr(model.config, name, value)
    with engine_on(model) as engine:
        assert engine.generate("?", TEXTS, max_new_tokens=3).token_ids == wanted
    assert all(getattr(model.config, name) is value for name, value in setting.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_dtype_needs_another_engine(dtype: torch.dtype) -> None:
    model = llama()
    with engine_on(model) as engine:
        model.to(dtype)
        with pytest.raises(ModelChangedError, match="model_changed"):
            engine.prefill("?", TEXTS)
        with pytest.raises((ModelChangedError, UnsupportedModelError), match=str(dtype).removeprefix("torch.")):
            engine.model_changed()
        with pytest.raises(ModelChangedError):
            engine.prefill("?", TEXTS)


def test_a_dtype_that_the_store_has_no_form_for_is_refused_when_the_engine_is_made() -> None:
    with pytest.raises(UnsupportedModelError, match=r"torch\.float64.*dtype=torch\.float32"):
        engine_on(llama().double())


class _Tuner(torch.nn.Module):
    """A layer as PEFT puts one around another: low-rank adapters by name."""

    def __init__(self, base: torch.nn.Linear):
        super().__init__()
        self.base_layer, self.merged_adapters, self.disable_adapters = base, [], False
        self.chosen, self.scaling = ["one"], {"one": 1.0, "two": 1.0}
        for name in self.scaling:
            self.register_parameter(name, torch.nn.Parameter(torch.full((base.out_features, base.in_features), 0.05)))

    @property
    def active_adapters(self) -> list[str]:
        return self.chosen

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        out = self.base_layer(hidden)
        for name in [] if self.disable_adapters else self.chosen:
            out = out + self.scaling[name] * torch.nn.functional.linear(hidden, self.get_parameter(name))
        return out


@pytest.mark.parametrize(
    "change",
    [
        lambda tuner: setattr(tuner, "chosen", ["two"]),
        lambda tuner: setattr(tuner, "disable_adapters", True),
        lambda tuner: tuner.merged_adapters.append("one"),
        lambda tuner: tuner.scaling.update(one=2.0),
    ],
    ids=["switched", "disabled", "merged", "scaled"],
)
def test_adapters_are_noticed(change: Callable[[Any], None]) -> None:
    model = llama()
    tuners = []
    for layer in model.model.layers:
        layer.self_attn.v_proj = _Tuner(layer.self_attn.v_proj)
        tuners.append(layer.self_attn.v_proj)
    with engine_on(model) as engine:
        engine.precompute([Document("a", TEXTS)])
        assert engine.prefill("?", TEXTS).report.missed == 0
        for tuner in tuners:
            change(tuner)
        with pytest.raises(ModelChangedError, match="adapters"):
            engine.prefill("?", TEXTS)
        assert engine.model_changed()
        state = engine.prefill("?", TEXTS, ratio=1.0)
        assert state.report.missed == sum(map(len, TEXTS))
        assert torch.allclose(state.logits[0], model.eval()(torch.tensor([state.prompt.ids])).logits[0, -1], atol=1e-4)


def test_peft_is_noticed(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = llama()
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)

    def refused(engine: CacheTune) -> None:
        with pytest.raises(ModelChangedError):
            engine.prefill("?", TEXTS)
        assert engine.model_changed()
        state = engine.prefill("?", TEXTS, ratio=1.0)
        assert torch.allclose(state.logits[0], model.eval()(torch.tensor([state.prompt.ids])).logits[0, -1], atol=1e-4)

    with engine_on(model, tmp_path / "kv") as engine:
        engine.precompute([Document("a", TEXTS)])
        wrapped = peft.get_peft_model(model, config)
        refused(engine)
        wrapped.add_adapter("other", config)
        wrapped.set_adapter("other")
        refused(engine)
        wrapped.base_model.disable_adapter_layers()
        refused(engine)
        wrapped.base_model.enable_adapter_layers()
        refused(engine)
        wrapped.merge_adapter()
        refused(engine)


def test_weights_on_a_device_are_looked_at_by_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where looking waits for it: a few of them with each request, all of them for what is stored."""
    monkeypatch.setattr(changes, "in_host_memory", lambda _: False)
    monkeypatch.setattr(changes, "TOGETHER", 4)
    asked: list[int] = []
    equal = torch.equal
    monkeypatch.setattr(changes.torch, "equal", lambda a, b: asked.append(a.numel()) or equal(a, b))
    model = llama()
    weights = changes.Weights(model)
    places = len(list(model.parameters())) * 2
    for _ in range(places):
        assert weights.change(every=False) is None
    assert len(asked) == places, "one question each time"
    assert max(asked) <= 4 * changes.SAMPLES
    model.model.layers[1].mlp.up_proj.weight.data += 0.1
    assert weights.change() == "model.layers.1.mlp.up_proj.weight has other values"
    found = [weights.change(every=False) for _ in range(places)]
    assert "model.layers.1.mlp.up_proj.weight has other values" in found


@contextmanager
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def _dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "setting",
    [
        _dtype,
        torch.inference_mode,
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.device("meta"),
        _deterministic,
    ],
    ids=["default dtype", "inference mode", "autocast", "default device", "deterministic"],
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


def test_the_callers_random_numbers_are_left_alone() -> None:
    model = llama()
    before = torch.get_rng_state()
    with CacheTune(model, tokenizer(), None, lead_in=[[1, *range(40, 60)], [1, *range(80, 100)]]) as engine:
        engine.precompute([Document("a", TEXTS)])
        engine.prefill("?", TEXTS, ratio=0.3)
        engine.generate("?", TEXTS, max_new_tokens=3, do_sample=True, seed=3)
    assert torch.equal(torch.get_rng_state(), before)


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
