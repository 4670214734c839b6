"""Which families share one copy of the weights with vLLM, in both forms, and which are refused at start, with the reason.

Models are loaded as vLLM loads them, without an engine: seconds instead of a start each.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from cachetune_rag.errors import UnsupportedModelError
from cachetune_rag.model import ModelAdapter
from cachetune_rag.model.loaded.fingerprint import model_fingerprint
from cachetune_vllm.divided_heads import DividedHeads
from cachetune_vllm.divided_layers import kv_heads_of
from cachetune_vllm.served_check import check_served
from cachetune_vllm.served_model import served_model
from tests import families
from tests.vllm.conftest import Loaded, heard

IDS = families.random_ids(150, seed=1)
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="vLLM packs weights on CPUs only, and tiny sizes have kernels there"
)
FORMS = pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])

NOT_SERVED: dict[str, str] = {
    "qwen2-sliding": "Sliding window for some but all layers is not supported",
    "stablelm-qk-norm": "no module or parameter named 'model.layers.0.self_attn.k_layernorm'",
}
"""Families whose tiny model vLLM itself refuses, with what it says."""
MIXTURES = {"mixtral", "mixtral-sliding", "qwen2-moe", "qwen3-moe", "gpt-oss"}
"""Mixtures of experts. On a CPU vLLM packs all experts, whatever else it leaves as it is."""
USUAL = {
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "phi3",
    "gpt-neox",
    "olmo2",
    "cohere",
    "glm4",
    "stablelm",
    "mixtral",
    "qwen2-moe",
}
"""Families that `make test` tries: one of each way in which weights are laid out. The others take minutes: `pytest -m every_family`."""


def rows() -> list[Any]:
    names = families.ids_of(families.FAMILIES)
    assert set(names) >= USUAL
    return [name if name in USUAL else pytest.param(name, marks=pytest.mark.every_family) for name in names]


def make(loaded: Loaded) -> Any:
    config = AutoConfig.from_pretrained(loaded.folder)
    return served_model(loaded.model, config, torch.float32, torch.device("cpu"), vllm_config=loaded.config)


@torch.no_grad()
def logits(model: Any, ids: list[int]) -> torch.Tensor:
    return model(input_ids=torch.tensor([ids])).logits[0]


@FORMS
@pytest.mark.parametrize("name", rows())
def test_a_family_works_or_is_refused_with_the_reason(
    load_tiny: Callable[..., Loaded], name: str, packed: bool
) -> None:
    if name in NOT_SERVED:
        with pytest.raises((AssertionError, ValueError), match=NOT_SERVED[name]):
            load_tiny(name, packed=packed)
        return
    loaded = load_tiny(name, packed=packed)
    served = make(loaded)
    assert served.form == ("packed" if packed or name in MIXTURES else "dense")
    assert bool(served.blocks) == (name in MIXTURES)
    torch.testing.assert_close(logits(served.model, IDS), logits(loaded.reference, IDS), atol=5e-5, rtol=0)
    layers = len(ModelAdapter(served.model).layers)  # the engine's own check of what it opens
    assert check_served(loaded.model, served, loaded.config) == layers > 0
    if served.form == "dense":
        # What `cachetune precompute` stores chunks under is what is looked for here.
        assert model_fingerprint(served.model) == model_fingerprint(loaded.reference)


def test_the_log_says_where_layers_could_not_be_compared_one_by_one(
    load_tiny: Callable[..., Loaded], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    loaded = load_tiny("llama", packed=False)
    served = make(loaded)
    with heard("served_check", caplog):
        assert check_served(loaded.model, served, loaded.config) > 0
        assert "layers one by one" not in caplog.text
        monkeypatch.setattr("cachetune_vllm.served_check._layers_around_attention", lambda model: [])
        assert check_served(loaded.model, served, loaded.config) == 0
    assert "LlamaForCausalLM: the check at start could not compare its 3 layers one by one" in caplog.text
    assert (
        "from the model's beginning to its end: queries, keys and values of every layer, and the logits." in caplog.text
    )


@pytest.mark.parametrize(
    ("name", "said"), [("olmo2", "self_attn.q_norm.weight is for the heads of all 2 workers"), ("qwen3", None)]
)
def test_norms_over_all_heads_are_refused_where_workers_share_them(
    load_tiny: Callable[..., Loaded], name: str, said: str | None
) -> None:
    """Norms of single heads are not."""
    loaded = load_tiny(name, packed=False, workers=2)
    config = AutoConfig.from_pretrained(loaded.folder)
    heads = DividedHeads(SimpleNamespace(world_size=2, rank_in_group=0, ranks=[0]), kv_heads_of(config))
    with nullcontext() if said is None else pytest.raises(UnsupportedModelError, match=said):
        served_model(loaded.model, config, torch.float32, torch.device("cpu"), heads)
