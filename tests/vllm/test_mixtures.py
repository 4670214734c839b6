"""A mixture of experts, whose blocks are vLLM's own: prompts are put together in turns with vLLM's steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.vllm.conftest import TinyVLLM
from tests.vllm.test_connector import CHUNKS, ON_CPU, Served, filled_store, prompt_of, report, shuffled, transfer
from tests.vllm.test_quantised import check_nearly_vllms_own, half_store


@pytest.fixture(scope="module")
def mixture(tiny_vllm: Callable[..., TinyVLLM], tmp_path_factory: pytest.TempPathFactory) -> Served:
    _, store = filled_store(tmp_path_factory.mktemp("mixture"), "mixtral")
    # Few tokens a step, so that a prompt is put together in several turns.
    return Served(tiny_vllm("mixtral", kv_transfer_config=transfer(store), max_num_batched_tokens=64), store)


@ON_CPU
@pytest.mark.parametrize(("selector", "ratio"), [("frequency", 0.15), ("expected_error", 0.2)])
def test_answers_are_those_of_the_embedded_engine(mixture: Served, selector: str, ratio: float) -> None:
    prompts = [shuffled(seed, count=2) for seed in range(6)]
    found = mixture.ask(prompts, selector=selector, ratio=ratio)
    assert [list(out.outputs[0].token_ids) for out in found] == mixture.engines(prompts, selector=selector, ratio=ratio)
    assert all(report(out)["reused"] > 0 for out in found)
    mixture.assert_nothing_left_behind()


def test_what_is_missed_is_computed_and_counted_as_not_stored(mixture: Served) -> None:
    text = "A note that nobody precomputed, which is some hundred letters long, and which nothing else has in common."
    out = mixture.ask([prompt_of([CHUNKS[0], text])], chunks=[CHUNKS[0], text], selector="frequency", ratio=0.2)[0]
    assert (report(out)["storing"], report(out)["unstored"]) == (0, 1)
    mixture.assert_nothing_left_behind()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_nearly_all_recomputed_is_nearly_vllms_own_answer(
    tiny_vllm: Callable[..., TinyVLLM], tmp_path: Path
) -> None:
    """In a 16-bit type: vLLM's kernel for experts multiplies float32 numbers as TF32, which is too coarse for the check at start."""
    store = half_store(tmp_path, "mixtral")
    up = tiny_vllm("mixtral", packed=False, dtype="bfloat16", kv_transfer_config=transfer(store, least_reused=0))
    check_nearly_vllms_own(Served(up, store))
