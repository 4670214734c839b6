"""One copy of the weights: transformers' model over what vLLM has loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from cachetune_vllm.served_model import ServedModel, served_model
from tests import families
from tests.vllm.conftest import TinyVLLM

IDS = families.random_ids(150, seed=1)
FORMS = pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])


def served(tiny: TinyVLLM) -> ServedModel:
    model = tiny.model
    parameter = next(model.parameters())
    return served_model(model, AutoConfig.from_pretrained(tiny.folder), parameter.dtype, parameter.device)


@torch.no_grad()
def logits(model: Any, ids: list[int]) -> torch.Tensor:
    return model(input_ids=torch.tensor([ids])).logits[0]


@FORMS
def test_the_shared_model_computes_what_transformers_and_vllm_compute(
    tiny_vllm: Callable[..., TinyVLLM], packed: bool
) -> None:
    tiny = tiny_vllm("llama", packed=packed)
    made = served(tiny)
    assert made.form == ("packed" if packed else "dense")
    found = logits(made.model, IDS)
    torch.testing.assert_close(found, logits(tiny.reference, IDS), atol=2e-5, rtol=0)
    ours = found[-1].log_softmax(-1)
    for token, theirs in tiny.last_logprobs(IDS).items():
        assert float(ours[token]) == pytest.approx(theirs, abs=1e-4)
