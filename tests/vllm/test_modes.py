"""The ways in which vLLM can plan its steps: the answers are the same in all of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from cachetune_rag.text.recognising.id_spans import without_beginning
from tests.vllm.conftest import TinyVLLM
from tests.vllm.models import SIZES
from tests.vllm.test_connector import (
    CHUNKS,
    ON_CPU,
    TOKENS,
    Served,
    filled_store,
    prompt_of,
    report,
    shuffled,
    transfer,
)

RANK = 8
IN_PIECES: dict[str, Any] = {
    "enable_chunked_prefill": True,
    "max_num_batched_tokens": 128,
    "async_scheduling": False,
    "speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2},
}
"""Prompts are read in several steps; answers are guessed ahead from the prompt's text, by code that is compiled for half a minute."""
AS_A_WHOLE: dict[str, Any] = {
    "enable_chunked_prefill": False,
    "max_num_batched_tokens": 4096,
    "async_scheduling": True,
    "enable_prefix_caching": False,
    "enable_lora": True,
    "max_lora_rank": RANK,
}
"""Prompts are read in one step, the next step is planned while one runs, nothing is kept for later prompts, and adapters are allowed."""


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(AS_A_WHOLE, id="as a whole"),
        pytest.param(IN_PIECES, id="in pieces", marks=pytest.mark.every_family),
    ],
)
def served(
    tiny_vllm: Callable[..., TinyVLLM], tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Served:
    _, store = filled_store(tmp_path_factory.mktemp("modes"))
    up = tiny_vllm("llama", packed=False, kv_transfer_config=transfer(store, loads_at_once=3), **request.param)
    return Served(up, store)


@ON_CPU
def test_answers_are_those_of_the_embedded_engine(served: Served) -> None:
    prompts = [shuffled(seed, count=3) for seed in range(8)] + [prompt_of([CHUNKS[0], CHUNKS[1], CHUNKS[0]])]
    for settings in ({"selector": "frequency", "ratio": 0.15}, {"selector": "expected_error", "ratio": 0.1}):
        outs = served.ask(prompts, **settings)
        assert [list(out.outputs[0].token_ids) for out in outs] == served.engines(prompts, **settings)
        assert all(report(out)["reused"] for out in outs)
        served.assert_nothing_left_behind()


@ON_CPU
def test_requests_without_reuse_are_vllms_own_beside_others(served: Served) -> None:
    prompts = [shuffled(seed, count=3) for seed in range(20, 26)]
    settings = {"selector": "none", "ratio": 0}
    params = [served.params(**({"reuse": False} if number % 2 else settings)) for number in range(len(prompts))]
    inputs = [{"prompt_token_ids": list(prompt.ids)} for prompt in prompts]
    outs = served.tiny.llm.generate(inputs, params, use_tqdm=False)
    found = [list(out.outputs[0].token_ids) for out in outs]
    # Of a prompt that begins like one before it, vLLM may have the first page, which holds what full prefill computes.
    kept = [report(out)["prefix_kept"] for out in outs[0::2]]
    begun = [without_beginning(prompt, count) for prompt, count in zip(prompts[0::2], kept, strict=True)]
    assert found[0::2] == served.engines(begun, **settings)
    assert found[1::2] == [served.tiny.reference_tokens(list(prompt.ids), TOKENS) for prompt in prompts[1::2]]
    assert served.tokens(prompts, ratio=1.0) == served.plain(prompts)
    served.assert_nothing_left_behind()


def test_requests_with_an_adapter_are_vllms_own(served: Served, tmp_path: Path) -> None:
    if served.tiny.llm.llm_engine.vllm_config.lora_config is None:
        pytest.skip("this server has no adapters")
    from vllm.lora.request import LoRARequest

    adapter, prompt = LoRARequest("one", 1, str(save_adapter(tmp_path))), shuffled(30)
    settings = {"selector": "none", "ratio": 0}
    inputs = [{"prompt_token_ids": list(prompt.ids)}]
    asked = [
        served.tiny.llm.generate(inputs, served.params(**given), use_tqdm=False, lora_request=adapter)[0]
        for given in (settings, {"reuse": False})
    ]
    assert report(asked[0]) == {"reused": 0, "left": "lora"}
    answers = [list(out.outputs[0].token_ids) for out in asked]
    assert answers[0] == answers[1] != served.plain([prompt])[0]
    assert served.tokens([prompt], **settings) == served.engines([prompt], **settings)
    served.assert_nothing_left_behind()


def save_adapter(folder: Path) -> Path:
    """Write an adapter for the queries of the tiny model's first layer, large enough that answers change."""
    width, numbers = SIZES["hidden_size"], torch.Generator().manual_seed(0)
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    factors = {
        f"{name}.lora_A.weight": torch.randn(RANK, width, generator=numbers),
        f"{name}.lora_B.weight": torch.randn(width, RANK, generator=numbers),
    }
    save_file(factors, folder / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return folder
