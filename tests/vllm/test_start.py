"""What a worker works out when it starts."""

from __future__ import annotations

import pytest

from cachetune_vllm.start import KEPT_FREE, tokens_that_fit

ROW = 128 << 10
"""Bytes of a token's keys and values in a model of Llama-3.1-8B's shape."""


@pytest.mark.parametrize(("free", "tokens"), [(0, 0), (KEPT_FREE, 0), (KEPT_FREE + (10 << 30), 49152)])
def test_prompts_fit_into_what_vllm_leaves_free(free: int, tokens: int) -> None:
    assert tokens_that_fit(free, ROW) == tokens
