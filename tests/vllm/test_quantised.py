"""Quantised models: vLLM's own modules multiply, and keys and values may be quantised in its pages."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cachetune_rag import CacheTune
from cachetune_vllm.served_check import check_served
from cachetune_vllm.served_fingerprint import config_of
from cachetune_vllm.served_model import served_model
from tests import tiny
from tests.vllm.conftest import Loaded, TinyVLLM
from tests.vllm.models import save_tiny
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
