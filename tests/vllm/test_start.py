"""What a worker works out when it starts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cachetune_vllm.start import KEPT_FREE, tokens_that_fit, unsupported

ROW = 128 << 10
"""Bytes of a token's keys and values in a model of Llama-3.1-8B's shape."""


@pytest.mark.parametrize(("free", "tokens"), [(0, 0), (KEPT_FREE, 0), (KEPT_FREE + (10 << 30), 49152)])
def test_prompts_fit_into_what_vllm_leaves_free(free: int, tokens: int) -> None:
    assert tokens_that_fit(free, ROW) == tokens


def config(**options: Any) -> Any:
    """The parts of vLLM's configuration that decide whether chunks can be reused."""
    said = {
        "pipeline_parallel_size": 1,
        "tensor_parallel_size": 1,
        "runner_type": "generate",
        "enable_sleep_mode": False,
    }
    values = SimpleNamespace(**{**said, **options})
    speculative = SimpleNamespace(method=options["method"]) if "method" in options else None
    return SimpleNamespace(parallel_config=values, model_config=values, speculative_config=speculative)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size"),
        ({"runner_type": "pooling"}, "doesn't generate text"),
        ({"enable_sleep_mode": True}, "--enable-sleep-mode"),
        ({"method": "eagle3"}, "method 'eagle3'"),
    ],
)
def test_options_that_reuse_cannot_live_with_are_named(options: dict[str, Any], said: str) -> None:
    assert said in str(unsupported(config(**options)))


@pytest.mark.parametrize("method", ["ngram", "suffix"])
def test_tokens_may_be_drafted_from_the_text(method: str) -> None:
    assert unsupported(config(method=method)) is None
