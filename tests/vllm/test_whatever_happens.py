"""Requests that are preempted, given up or meet a damaged store: the answer is right, and nothing stays behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cachetune_rag import CacheTune
from tests import tiny
from tests.vllm.conftest import TinyVLLM
from tests.vllm.test_connector import (
    CHUNKS,
    TOKENS,
    Served,
    encode,
    filled_store,
    prompt_of,
    report,
    shuffled,
    transfer,
)

LONG = 180
"""Tokens of a long answer."""
PAGE, FEW_PAGES = 32, 66
"""Tokens in a page, and pages of vLLM's cache: enough for the longest prompt, and too few for all requests of a test at once."""


@pytest.fixture(scope="module")
def crowded(tiny_vllm: Callable[..., TinyVLLM], tmp_path_factory: pytest.TempPathFactory) -> Served:
    """A server with little memory, that loads one prompt at a time."""
    _, store = filled_store(tmp_path_factory.mktemp("crowded"))
    settings = transfer(store, loads_at_once=2)
    up = tiny_vllm(
        "llama", packed=False, kv_transfer_config=settings, block_size=PAGE, num_gpu_blocks_override=FEW_PAGES
    )
    return Served(up, store)


def run(served: Served, tokens: int, prompts: list[Any], **asked: Any) -> list[list[int]]:
    outs = served.ask(prompts, more={"max_tokens": tokens}, **asked)
    return [list(out.outputs[0].token_ids) for out in outs]


def test_preempted_requests_are_put_together_again(crowded: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not all answers fit: vLLM takes pages away from some requests, and gives them others later."""
    prompts = [shuffled(seed, count=1) for seed in range(8)]
    preempted: list[str] = []
    scheduler = crowded.scheduler
    before = scheduler._preempt_request  # noqa: SLF001 (vLLM counts preemptions only in its log)
    monkeypatch.setattr(
        scheduler, "_preempt_request", lambda r, *a, **k: (preempted.append(r.request_id), before(r, *a, **k))[1]
    )
    settings = {"selector": "frequency", "ratio": 0.15}
    found = run(crowded, LONG, prompts, **settings)
    alone = [run(crowded, LONG, [prompt], **settings)[0] for prompt in prompts]
    assert preempted
    assert found == alone
    assert [tokens[:TOKENS] for tokens in found] == crowded.engines(prompts, **settings)
    crowded.assert_nothing_left_behind()


def test_requests_given_up_while_loading_leave_nothing_behind(crowded: Served) -> None:
    from vllm import SamplingParams

    core, prompts = crowded.tiny.llm.llm_engine, [shuffled(seed, count=2) for seed in range(6)]
    extra = {"kv_transfer_params": {"cachetune": {"selector": "frequency", "ratio": 0.3}}}
    params = SamplingParams(temperature=0, max_tokens=4, detokenize=False, extra_args=extra)
    for number, prompt in enumerate(prompts):
        core.add_request(f"r{number}", {"prompt_token_ids": list(prompt.ids)}, params)
    core.step()
    core.abort_request([f"r{number}" for number in range(4)])
    answered = set()
    while core.has_unfinished_requests():
        answered |= {out.request_id for out in core.step() if out.finished and out.outputs[0].finish_reason == "length"}
    assert {name.split("-")[0] for name in answered} == {"r4", "r5"}
    crowded.tokens([shuffled(9)])  # a step behind, in which vLLM hears that loads of aborted requests ended
    crowded.assert_nothing_left_behind()


def test_several_answers_to_one_prompt(crowded: Served) -> None:
    prompt = shuffled(11, count=2)
    out = crowded.ask([prompt], more={"n": 3, "temperature": 0.8, "seed": 1}, selector="frequency", ratio=0.1)[0]
    assert len(out.outputs) == 3
    assert all(len(answer.token_ids) == TOKENS for answer in out.outputs)
    crowded.assert_nothing_left_behind()


def test_prompt_logprobs_are_vllms_own(crowded: Served) -> None:
    prompt = shuffled(12, count=2)
    out = crowded.ask([prompt], more={"prompt_logprobs": 1}, ratio=0.1)[0]
    assert report(out) == {"reused": 0, "left": "prompt logprobs"}
    assert len(out.prompt_logprobs) == len(prompt.ids)


def test_a_damaged_chunk_is_computed(crowded: Served, tmp_path: Path) -> None:
    """Each chunk file is damaged under the server's eyes: vLLM computes what can't be read, and the answer is right."""
    prompt = prompt_of(
        ["A passage of its own that only this test has in the store, some hundred letters long, and no other."]
    )
    with CacheTune(crowded.tiny.reference, tiny.tokenizer(), crowded.store) as engine:
        engine.precompute(list(prompt.chunk_texts))
    files = sorted((crowded.store / "chunks").rglob("*.safetensors"), key=lambda file: file.stat().st_mtime)
    newest = files[-1]
    data = bytearray(newest.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 2000] = bytes(2000)
    newest.write_bytes(data)
    named = {"chunks": list(prompt.chunk_texts), "selector": "none", "ratio": 0}
    out = crowded.ask([prompt], **named)[0]
    assert list(out.outputs[0].token_ids) == crowded.plain([prompt])[0]
    crowded.assert_nothing_left_behind()


def test_named_chunks_that_were_missed_are_stored_behind_the_request(crowded: Served) -> None:
    text = "A note that nobody precomputed, and that the next request with it should find in the store, whoever asks for it."
    prompt = prompt_of([CHUNKS[0], text])
    settings = {"selector": "expected_error", "ratio": 0.15, "chunks": [CHUNKS[0], text]}
    first = report(crowded.ask([prompt], **settings)[0])
    assert (first["missed"], first["storing"]) == (len(encode(text)), 1)
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    connector = get_kv_transfer_group()
    assert connector.engines.default.backfill.wait(60)
    assert report(crowded.ask([prompt], **settings)[0])["left"] == "same prompt"  # its pages are still there
    second = report(crowded.ask([prompt_of([CHUNKS[0], text], "And now?")], **settings)[0])
    assert second["missed"] == 0
    assert second["reused"] > first["reused"]


def test_a_store_that_is_gone_costs_what_is_not_in_memory(crowded: Served) -> None:
    prompts = [shuffled(seed, count=2) for seed in range(30, 33)]
    settings = {"selector": "none", "ratio": 0}
    before = crowded.tokens(prompts, **settings)
    crowded.store.rename(crowded.store.with_name("gone"))
    assert crowded.tokens(prompts, **settings) == before
    crowded.assert_nothing_left_behind()
