"""A model divided between two workers: answers are those of the embedded engine, whatever happens to one of them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cachetune_rag import CacheTune
from tests import tiny
from tests.vllm.conftest import TinyVLLM
from tests.vllm.models import row_of, save_tiny
from tests.vllm.test_connector import (
    CHUNKS,
    ON_CPU,
    SETTINGS,
    Served,
    encode,
    filled_store,
    prompt_of,
    report,
    shuffled,
    transfer,
)


@pytest.fixture(scope="module")
def divided(tiny_vllm: Callable[..., TinyVLLM], tmp_path_factory: pytest.TempPathFactory) -> Served:
    if torch.cuda.is_available() and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    _, store = filled_store(tmp_path_factory.mktemp("divided"))
    # Few tokens a step, so that a prompt is put together in several turns.
    up = tiny_vllm(
        "llama", kv_transfer_config=transfer(store), tensor_parallel_size=2, max_num_batched_tokens=64, block_size=32
    )
    return Served(up, store)


@ON_CPU
@SETTINGS
def test_answers_are_those_of_the_embedded_engine(divided: Served, selector: str, ratio: float) -> None:
    prompts = [shuffled(seed) for seed in range(4)]
    found = divided.ask(prompts, selector=selector, ratio=ratio)
    assert [list(out.outputs[0].token_ids) for out in found] == divided.engines(prompts, selector=selector, ratio=ratio)
    chunk_tokens = [sum(span.end - span.start for span in prompt.spans) for prompt in prompts]
    assert [report(out)["reused"] + report(out)["recomputed"] for out in found] == chunk_tokens
    divided.assert_nothing_left_behind()


@ON_CPU
@pytest.mark.parametrize("selector", ["kv_deviation", "layer0_value", "probe"])
def test_selectors_see_all_heads(divided: Served, selector: str) -> None:
    prompts = [shuffled(5)]
    assert divided.tokens(prompts, selector=selector, ratio=0.2) == divided.engines(
        prompts, selector=selector, ratio=0.2
    )


def test_all_recomputed_gives_vllms_own_answer(divided: Served) -> None:
    prompts = [shuffled(seed) for seed in range(10, 12)]
    assert divided.tokens(prompts, ratio=1.0) == divided.plain(prompts)


@ON_CPU
def test_many_requests_at_once_beside_plain_ones(divided: Served) -> None:
    prompts = [shuffled(seed, count=2) for seed in range(40, 52)]
    settings = {"selector": "expected_error", "ratio": 0.15}
    assert divided.tokens(prompts, **settings) == divided.engines(prompts, **settings)
    divided.assert_nothing_left_behind()


@ON_CPU
def test_a_damaged_chunk_is_computed_by_all(divided: Served) -> None:
    text = "A passage of its own that only this test has in the store, some hundred letters long, and no other."
    prompt = prompt_of([CHUNKS[0], text])
    with CacheTune(divided.tiny.reference, tiny.tokenizer(), divided.store) as engine:
        engine.precompute([text])
    newest = max((divided.store / "chunks").rglob("*.safetensors"), key=lambda file: file.stat().st_mtime)
    data = bytearray(newest.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 2000] = bytes(2000)
    newest.write_bytes(data)
    out = divided.ask([prompt], chunks=[CHUNKS[0], text], selector="expected_error", ratio=0.2)[0]
    assert report(out)["missed"] == len(encode(text))
    assert (report(out)["storing"], report(out)["unstored"]) == (0, 1)  # no worker has all heads of what is missed
    wanted = divided.engines([prompt], selector="expected_error", ratio=0.2)
    assert [list(out.outputs[0].token_ids)] == wanted
    divided.assert_nothing_left_behind()


def test_requests_given_up_while_loading_leave_nothing_behind(divided: Served) -> None:
    prompts = [shuffled(seed, count=2) for seed in range(60, 66)]
    divided.assert_given_up_while_loading(prompts, selector="expected_error", ratio=0.3)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@SETTINGS
def test_on_two_gpus_first_tokens_are_as_likely_as_in_the_engine(divided: Served, selector: str, ratio: float) -> None:
    divided.assert_first_tokens_as_likely(selector, ratio)


USUAL = ["llama", "llama-llama3", "qwen2", "qwen3", "gemma2", "phi3"]
"""One of each way in which a model is divided: tied and own heads, biases, norms of heads, a scaled embedding, joined projections."""


@ON_CPU
@pytest.mark.every_family
def test_families_are_divided_as_vllm_divides_them(tmp_path: Path) -> None:
    """Also a model with fewer key-value heads than workers, where both have the same one."""
    folders = [save_tiny(name, tmp_path) for name in USUAL]
    one_head = row_of("llama")
    one_head = replace(one_head, config=one_head.config | {"num_key_value_heads": 1})
    folders.append(tmp_path / "one-head")
    one_head.build().save_pretrained(folders[-1])
    tiny.tokenizer().save_pretrained(folders[-1])
    words = [sys.executable, "-m", "tests.vllm.divided_process"]
    workers = [
        subprocess.Popen(
            [*words, str(rank), str(tmp_path / "meet"), *map(str, folders)], stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    for worker in workers:
        out, _ = worker.communicate(timeout=600)
        assert worker.returncode == 0
        found = [json.loads(line) for line in out.splitlines() if line.startswith('{"name"')]
        assert [(one["name"], one["packed"]) for one in found] == [(f.name, p) for f in folders for p in (False, True)]
        for one in found:
            assert one.get("form") == ("packed" if one["packed"] else "dense"), one
            assert one["off"] < 5e-5, one
            assert one["stored"] == (1 if one["name"] == "one-head" else 2), one
