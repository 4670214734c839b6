"""Quantised models: vLLM's own modules multiply, and keys and values may be quantised in its pages."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cachetune_rag import CacheTune, UnsupportedModelError
from cachetune_vllm.served_check import check_served
from cachetune_vllm.served_fingerprint import config_of
from cachetune_vllm.served_model import served_model
from tests import tiny
from tests.vllm.conftest import Loaded, TinyVLLM
from tests.vllm.models import row_of, save_tiny
from tests.vllm.test_connector import CHUNKS, ON_CPU, Served, report, shuffled, transfer

INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
SCHEME = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": INT8 | {"strategy": "channel", "dynamic": False},
            "input_activations": INT8 | {"strategy": "token", "dynamic": True},
        }
    },
    "ignore": ["lm_head"],
}


def int8_checkpoint(folder: Path) -> Path:
    """A tiny model whose linear layers hold 8-bit integers with a scale a row, as compressed-tensors writes them."""
    place = save_tiny("llama", folder)
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | {"quantization_config": SCHEME}))
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(place / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            scale = tensor.abs().amax(1, keepdim=True) / 127
            tensors[name] = (tensor / scale).round().to(torch.int8)
            tensors[f"{name}_scale"] = scale
        else:
            tensors[name] = tensor
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    return place


@ON_CPU
def test_layers_of_8_bit_integers_are_vllms_own(load_tiny: Callable[..., Loaded], tmp_path: Path) -> None:
    loaded = load_tiny(folder=int8_checkpoint(tmp_path), packed=False, dtype="bfloat16")
    served = served_model(
        loaded.model, config_of(loaded.config.model_config), torch.bfloat16, next(loaded.model.parameters()).device
    )
    assert {name.rpartition(".")[2] for name in served.packed} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    check_served(loaded.model, served, loaded.config)


def deep_checkpoint(folder: Path, layers: int = 16, large: float | None = None) -> Path:
    """A tiny model of many layers whose products are as large as those of models with thousands of channels: a layer's result isn't small beside its
    input, unless its embeddings are `large`."""
    row = row_of("llama")
    model = replace(row, config=row.config | {"num_hidden_layers": layers}).build()
    for name, weight in model.named_parameters():
        if name.endswith("_proj.weight"):
            torch.nn.init.normal_(weight, std=1.28 / weight.shape[1] ** 0.5)
    if large is not None:
        torch.nn.init.normal_(model.get_input_embeddings().weight, std=large)
    model.to(torch.bfloat16).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


class Swapped(torch.nn.Module):
    """An activation that takes the gate for what it gates."""

    def forward(self, both: torch.Tensor) -> torch.Tensor:
        up, gate = both.chunk(2, -1)
        return torch.nn.functional.silu(gate) * up


@ON_CPU
def test_the_check_at_start_sees_what_deep_layers_add_to_large_numbers(
    load_tiny: Callable[..., Loaded], tmp_path: Path
) -> None:
    """In real models, what a layer adds is often small beside what goes through it."""
    loaded = load_tiny(folder=deep_checkpoint(tmp_path, large=30), packed=True, dtype="bfloat16")
    config = config_of(loaded.config.model_config)

    def check() -> int:
        return check_served(
            loaded.model, served_model(loaded.model, config, torch.bfloat16, torch.device("cpu")), loaded.config
        )

    assert check() == 16
    for layer in loaded.model.model.layers[4:]:
        layer.mlp.act_fn = Swapped()
    with pytest.raises(UnsupportedModelError, match="what layer 4 adds differs between transformers' code and vLLM's"):
        check()


def in_8_bit_floats(rows: torch.Tensor) -> torch.Tensor:
    """The rows as vLLM's kernels for 8-bit floats read them: each with a scale of its own."""
    scale = rows.float().abs().amax(-1, keepdim=True).clamp_min(1e-12) / torch.finfo(torch.float8_e4m3fn).max
    return ((rows.float() / scale).to(torch.float8_e4m3fn).float() * scale).to(rows.dtype)


class RoundedOnce(torch.nn.Module):
    """A gate that is applied as kernels of GPUs apply it, in one go; vLLM's for CPUs rounds in the middle, as transformers does."""

    def forward(self, both: torch.Tensor) -> torch.Tensor:
        gate, up = both.float().chunk(2, -1)
        return (torch.nn.functional.silu(gate) * up).to(both.dtype)


class TooLong(torch.nn.Module):
    """An error of one layer that is smaller than what rounding adds up to in so deep a layer: its queries are 15% too long."""

    def __init__(self, rotate: torch.nn.Module):
        super().__init__()
        self._rotate = rotate

    def forward(self, *given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        queries, keys = self._rotate(*given)
        return 1.15 * queries, keys


@ON_CPU
def test_the_check_at_start_allows_what_8_bit_floats_make_of_rounding_and_no_more(
    load_tiny: Callable[..., Loaded], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM has no kernel for them on a CPU, so its own modules are given rows that were rounded so."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    multiply = UnquantizedLinearMethod.apply
    monkeypatch.setattr(
        UnquantizedLinearMethod,
        "apply",
        lambda self, layer, x, bias=None: multiply(self, layer, in_8_bit_floats(x), bias),
    )
    loaded = load_tiny(folder=deep_checkpoint(tmp_path), packed=True, dtype="bfloat16")
    for layer in loaded.model.model.layers:
        layer.mlp.act_fn = RoundedOnce()
    config = config_of(loaded.config.model_config)

    def check() -> None:
        served = served_model(loaded.model, config, torch.bfloat16, torch.device("cpu"))
        assert served.packed
        check_served(loaded.model, served, loaded.config)

    check()
    with monkeypatch.context() as without:
        without.setattr("cachetune_vllm.served_check._layers_around_attention", lambda model: [])
        with pytest.raises(UnsupportedModelError, match=r"differ between transformers' code and vLLM's by 0\.1"):
            check()  # rounding adds up
    deep = loaded.model.model.layers[14].self_attn
    rotate, deep.rotary_emb = deep.rotary_emb, TooLong(deep.rotary_emb)
    with pytest.raises(UnsupportedModelError, match="the queries of layer 14 differ"):
        check()
    deep.rotary_emb = rotate
    config.rope_parameters = {"rope_type": "default", "rope_theta": 5000.0}
    with pytest.raises(UnsupportedModelError, match="the queries of layer 0 differ"):
        check()


def half_store(folder: Path, family: str) -> Path:
    """Chunks of a tiny model in bfloat16."""
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(save_tiny(family, folder), dtype=torch.bfloat16).eval()
    with CacheTune(loaded, tiny.tokenizer(), folder / "kv") as engine:
        engine.precompute(CHUNKS)
    return folder / "kv"


def check_nearly_vllms_own(served: Served) -> None:
    """With nearly all chunk tokens recomputed, first tokens are about as likely as in vLLM's own answers; beside running requests, too.

    8-bit numbers move the likelihoods of a tiny random model visibly, and vLLM computes in another order than the engine. So the
    differences are held against those between vLLM's own answers to different prompts, which wrong keys or values would come close to.
    """
    prompts = [shuffled(seed) for seed in range(100, 108)]
    more = {"max_tokens": 1, "logprobs": 20}
    reusing = served.ask(prompts, more=more, selector="chunk_head", ratio=0.99)
    assert all(report(out)["reused"] > 0 for out in reusing)
    # Plain requests come second: what vLLM has computed and kept of them would be taken as it is.
    own = served.ask(prompts, more=more, reuse=False)
    same = [apart(a, b) for a, b in zip(reusing, own, strict=True)]
    others = [apart(a, b) for a, b in itertools.pairwise(own)]
    assert statistics.mean(same) < 0.25 * statistics.mean(others), (same, others)
    again = served.tokens(prompts, selector="frequency", ratio=0.15)
    assert served.tokens(prompts, selector="frequency", ratio=0.15) == again
    served.assert_nothing_left_behind()


def apart(one: Any, other: Any) -> float:
    """How far the log probabilities of two answers' first tokens are apart, over the tokens that both say them of."""
    first, second = one.outputs[0].logprobs[0], other.outputs[0].logprobs[0]
    return statistics.mean(abs(first[token].logprob - second[token].logprob) for token in first if token in second)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_weights_quantised_while_they_are_loaded(
    tiny_vllm: Callable[..., TinyVLLM], family: str, tmp_path: Path
) -> None:
    store = half_store(tmp_path, family)
    up = tiny_vllm(
        family, packed=False, dtype="bfloat16", quantization="fp8", kv_transfer_config=transfer(store, least_reused=0)
    )
    check_nearly_vllms_own(Served(up, store))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_pages_of_8_bit_floats(tiny_vllm: Callable[..., TinyVLLM], tmp_path: Path) -> None:
    store = half_store(tmp_path, "llama")
    up = tiny_vllm(
        "llama",
        packed=False,
        dtype="bfloat16",
        kv_cache_dtype="fp8",
        kv_transfer_config=transfer(store, least_reused=0),
    )
    check_nearly_vllms_own(Served(up, store))
