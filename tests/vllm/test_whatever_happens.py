"""Requests that are preempted, given up or meet a damaged store: the answer is right, and nothing stays behind."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from cachetune_rag import CacheTune
from cachetune_rag.text.prompts.segments import Prompt
from cachetune_vllm.metrics import ReuseStats
from cachetune_vllm.pages import Pages
from cachetune_vllm.scheduler import ReuseScheduler
from tests import tiny
from tests.faulty_disk import Fault, faulty_disk
from tests.vllm.conftest import MAX_MODEL_LEN, TinyVLLM
from tests.vllm.fuzz import Fuzz
from tests.vllm.test_connector import (
    CHUNKS,
    TOKENS,
    Served,
    encode,
    engines_of_worker,
    filled_store,
    prompt_of,
    report,
    shuffled,
    transfer,
    with_chunks,
)

LONG = 180
"""Tokens of a long answer."""
PAGE, FEW_PAGES = 32, 66
"""Tokens in a page, and pages of vLLM's cache: enough for the longest prompt, and too few for all requests of a test at once."""


@pytest.fixture(scope="module")
def crowded(tiny_vllm: Callable[..., TinyVLLM], tmp_path_factory: pytest.TempPathFactory) -> Served:
    """A server with little memory for pages, none for chunks, and room for two prompts that load. It reads prompts in pieces."""
    _, store = filled_store(tmp_path_factory.mktemp("crowded"))
    settings = transfer(store, loads_at_once=2, host_budget=0)
    up = tiny_vllm(
        "llama",
        packed=False,
        kv_transfer_config=settings,
        block_size=PAGE,
        num_gpu_blocks_override=FEW_PAGES,
        async_scheduling=False,  # both are otherwise in tests/vllm/test_modes.py
        max_num_batched_tokens=256,
        structured_outputs_config={"backend": "xgrammar", "disable_any_whitespace": True},
    )
    return Served(up, store)


def poll(condition: Callable[[], bool]) -> bool:
    """Whether a condition holds within a minute."""
    until = time.monotonic() + 60
    while not condition() and time.monotonic() < until:
        time.sleep(0.01)
    return condition()


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
    put_together: list[str] = []
    allocated = ReuseScheduler.allocated
    monkeypatch.setattr(
        ReuseScheduler,
        "allocated",
        lambda self, r, blocks, n: (put_together.append(r.request_id) if n else None, allocated(self, r, blocks, n)),
    )
    settings = {"selector": "frequency", "ratio": 0.15}
    found = run(crowded, LONG, prompts, **settings)
    assert preempted
    again = set(preempted) & {name for name in put_together if put_together.count(name) > 1}
    assert again, "none of the preempted requests had lost its pages: this test can't tell"
    alone = [run(crowded, LONG, [prompt], **settings)[0] for prompt in prompts]
    assert found == alone
    assert found != run(
        crowded, LONG, prompts, reuse=False
    )  # an answer to a prompt that was read in full would be another
    crowded.assert_nothing_left_behind()


def test_requests_given_up_while_loading_leave_nothing_behind(crowded: Served) -> None:
    prompts = [shuffled(seed, count=2) for seed in range(6)]
    crowded.assert_given_up_while_loading(prompts, selector="frequency", ratio=0.3)


def test_several_answers_to_one_prompt(crowded: Served) -> None:
    prompt = shuffled(11, count=2)
    out = crowded.ask([prompt], more={"n": 3, "temperature": 0.8, "seed": 1}, selector="frequency", ratio=0.1)[0]
    assert len(out.outputs) == 3
    assert all(len(answer.token_ids) == TOKENS for answer in out.outputs)
    crowded.assert_nothing_left_behind()


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The reasons for which requests are left to vLLM during a test."""
    reasons: list[str] = []
    add_left = ReuseStats.add_left
    monkeypatch.setattr(
        ReuseStats, "add_left", lambda self, reason, *told: (reasons.append(reason), add_left(self, reason, *told))
    )
    return reasons


def filled_up(tokens: int) -> Prompt:
    """A prompt of exactly so many tokens."""
    return prompt_of(CHUNKS[:3], "x" * (tokens - len(prompt_of(CHUNKS[:3], "").ids)))


def test_wrong_rows_are_found_by_the_same_prompt_alone(crowded: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reused rows are planted that are wrong beyond all doubt: nobody else ever sees them."""
    prompt, settings = shuffled(13, count=2), {"selector": "none", "ratio": 0}
    longer = prompt_of(list(prompt.chunk_texts), "What is 13?\nAnswer: And then?")
    write = Pages.write
    with monkeypatch.context() as patch:
        patch.setattr(
            Pages, "write", lambda self, layer, keys, values, slots: write(self, layer, -keys, -values, slots)
        )
        crowded.tokens([prompt], **settings)
    assert crowded.tokens([prompt], **settings) != crowded.engines([prompt], **settings)  # they are in vLLM's cache
    for others, asked in ((longer, settings), (prompt, {"selector": "frequency", "ratio": 0.1})):
        assert crowded.tokens([others], **asked) == crowded.engines([others], **asked)
    assert crowded.plain([prompt]) == [crowded.tiny.reference_tokens(list(prompt.ids), TOKENS)]


def test_structured_answers_are_the_likeliest_ones_that_are_allowed(crowded: Served) -> None:
    from vllm.sampling_params import StructuredOutputsParams

    prompts, settings = [shuffled(seed, count=2) for seed in range(14, 17)], {"selector": "frequency", "ratio": 0.15}
    regex = {"structured_outputs": StructuredOutputsParams(regex="[a-e]{6}"), "ignore_eos": False}
    found = [list(out.outputs[0].token_ids)[:6] for out in crowded.ask(prompts, more=regex, **settings)]
    assert found == crowded.engines(prompts, tokens=6, allowed=encode("abcde"), **settings)
    other, one = ([list(out.outputs[0].token_ids) for out in crowded.ask(prompts, more=regex, ratio=r)] for r in (0, 1))
    assert one == [list(out.outputs[0].token_ids) for out in crowded.ask(prompts, more=regex, reuse=False)]
    assert one != other


@pytest.mark.parametrize(
    "asked",
    [
        {"choice": ["yes", "no"]},
        {"grammar": 'root ::= "yes" | "no"'},
        {"json": {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}},
    ],
    ids=["choice", "grammar", "json"],
)
def test_structured_answers_have_the_form_that_was_asked_for(crowded: Served, asked: dict[str, Any]) -> None:
    from vllm.sampling_params import StructuredOutputsParams

    more = {"structured_outputs": StructuredOutputsParams(**asked)}
    prompts = [shuffled(seed, count=2) for seed in range(17, 20)]
    for out in crowded.ask(prompts, more=more | {"ignore_eos": False, "detokenize": True, "max_tokens": 40}, ratio=0.1):
        assert report(out)["reused"] > 0
        text = out.outputs[0].text
        assert isinstance(json.loads(text)["ok"], bool) if "json" in asked else text in ("yes", "no")
    crowded.assert_nothing_left_behind()


def test_beams_are_vllms_own(crowded: Served, left: list[str]) -> None:
    from vllm.sampling_params import BeamSearchParams

    prompt, width, tokens = shuffled(20, count=2), 2, 4
    params = BeamSearchParams(beam_width=width, max_tokens=tokens, ignore_eos=True)
    found = crowded.tiny.llm.beam_search([{"prompt_token_ids": list(prompt.ids)}], params)[0].sequences
    assert [beam.tokens[-tokens:] for beam in found] == beams_of(crowded.tiny.reference, prompt.ids, width, tokens)
    assert left == ["beam search"] * (1 + width * (tokens - 1))
    crowded.assert_nothing_left_behind()


@torch.no_grad()
def beams_of(model: Any, ids: tuple[int, ...], width: int, tokens: int) -> list[list[int]]:
    """The likeliest beams, from transformers' model."""
    beams: list[tuple[float, list[int]]] = [(0.0, [])]
    for _ in range(tokens):
        grown = []
        for score, made in beams:
            ahead = model(input_ids=torch.tensor([[*ids, *made]])).logits[0, -1].log_softmax(-1).topk(2 * width)
            grown += [(score + float(s), [*made, int(t)]) for s, t in zip(*ahead, strict=True)]
        beams = sorted(grown, reverse=True)[:width]
    return [made for _, made in beams]


def test_the_longest_prompt_and_one_that_is_too_long(crowded: Served) -> None:
    settings = {"selector": "frequency", "ratio": 0.15}
    with pytest.raises(Exception, match="2048 tokens"):  # of which class depends on vLLM's version
        crowded.ask([filled_up(MAX_MODEL_LEN + 1)], **settings)
    for room in (1, 3):
        prompt = filled_up(MAX_MODEL_LEN - room)
        out = crowded.ask([prompt], more={"max_tokens": None}, **settings)[0]
        assert report(out)["reused"] > 0
        assert [list(out.outputs[0].token_ids)] == crowded.engines([prompt], tokens=room, **settings)
    crowded.assert_nothing_left_behind()


def test_prompt_logprobs_are_vllms_own(crowded: Served) -> None:
    prompt = shuffled(12, count=2)
    out = crowded.ask([prompt], more={"prompt_logprobs": 1}, ratio=0.1)[0]
    assert report(out) == {"reused": 0, "left": "prompt logprobs"}
    assert len(out.prompt_logprobs) == len(prompt.ids)


@pytest.mark.parametrize(
    ("fault", "counted"),
    [
        (Fault("garbage", ("preadv",)), "damaged"),
        (Fault("EIO", ("open", "preadv", "stat")), "unreadable"),
        (Fault("EIO", ("preadv",), after=2), "damaged"),
    ],
    ids=["damaged", "gone", "gone in the middle"],
)
def test_a_chunk_that_cannot_be_read_is_computed_and_counted(
    crowded: Served, fault: Fault, counted: str, request: pytest.FixtureRequest
) -> None:
    """The other chunk of the prompt is reused."""
    text = f"A passage of its own that only the test of a disk that is {request.node.callspec.id} has in the store."
    with CacheTune(crowded.tiny.reference, tiny.tokenizer(), crowded.store) as engine:
        engine.precompute([text])
    file = max((crowded.store / "chunks").rglob("*.safetensors"), key=lambda file: file.stat().st_mtime_ns)
    prompt, settings = prompt_of([text, CHUNKS[0]]), {"selector": "none", "ratio": 0}
    with faulty_disk(file, fault):
        out = crowded.ask([prompt], chunks=[text, CHUNKS[0]], **settings)[0]
        assert fault.met
    said = report(out)
    assert (said[counted], said["missed"], said["reused"]) == (1, len(encode(text)), len(encode(CHUNKS[0])))
    assert [list(out.outputs[0].token_ids)] == crowded.engines([with_chunks(prompt, [1])], **settings)
    crowded.assert_nothing_left_behind()


def test_a_late_disk_is_not_waited_for_twice(crowded: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines_of_worker().default.pool, "seconds", 0.5)
    prompts, settings = [shuffled(seed, count=2) for seed in (21, 22)], {"selector": "none", "ratio": 0}
    with faulty_disk(crowded.store / "chunks", Fault("stuck", ("preadv",))) as fault:
        outs = crowded.ask(prompts[:1], **settings)
        asked = fault.met
        assert asked
        outs += crowded.ask(prompts[1:], **settings)
        assert fault.met == asked, "the second prompt asked the disk as well"
    assert [report(out)["left"] for out in outs] == ["failed", "failed"]
    assert [list(out.outputs[0].token_ids) for out in outs] == crowded.plain(prompts)
    pool = engines_of_worker().default.pool
    assert poll(lambda: not pool.overdue)
    crowded.assert_nothing_left_behind()
    again = [shuffled(seed, count=2) for seed in (23, 24)]
    monkeypatch.undo()
    assert crowded.tokens(again, **settings) == crowded.engines(again, **settings)


def test_named_chunks_that_were_missed_are_stored_behind_the_request(crowded: Served) -> None:
    text = "A note that nobody precomputed, and that the next request with it should find in the store, whoever asks for it."
    prompt = prompt_of([CHUNKS[0], text])
    settings = {"selector": "expected_error", "ratio": 0.15, "chunks": [CHUNKS[0], text]}
    first = report(crowded.ask([prompt], **settings)[0])
    assert (first["missed"], first["storing"]) == (len(encode(text)), 1)
    assert engines_of_worker().default.backfill.wait(60)
    assert report(crowded.ask([prompt], **settings)[0])["left"] == "same prompt"  # its pages are still there
    second = report(crowded.ask([prompt_of([CHUNKS[0], text], "And now?")], **settings)[0])
    assert second["missed"] == 0
    assert second["reused"] > first["reused"]


def test_random_requests(crowded: Served) -> None:
    """Some are given up; vLLM preempts others. CACHETUNE_FUZZ_ROUNDS=100 goes on for some minutes."""
    for seed in range(int(os.environ.get("CACHETUNE_FUZZ_ROUNDS", "1"))):
        fuzz = Fuzz(crowded, seed)
        answered = fuzz.run(30)
        assert len(answered) > 15
        assert fuzz.wrong(answered) == []
        crowded.tokens([shuffled(9)])  # a step behind, in which vLLM hears that loads of aborted requests ended
        crowded.assert_nothing_left_behind()


def test_a_store_that_is_gone_costs_what_was_in_it(crowded: Served) -> None:
    prompt, again = shuffled(30, count=2), shuffled(31, count=2)
    settings = {"selector": "none", "ratio": 0}
    away = crowded.store.rename(crowded.store.with_name("away"))
    out = crowded.ask([prompt], **settings)[0]
    assert (report(out)["reused"], report(out)["left"]) == (0, "missed")
    # The pages that vLLM has computed are found as any others, and nobody says that something of them was reused.
    once_more = crowded.ask([prompt], **settings)[0]
    assert (report(once_more)["reused"], report(once_more)["left"]) == (0, "cached")
    assert once_more.num_cached_tokens
    assert [list(out.outputs[0].token_ids)] == crowded.plain([prompt])
    away.rename(crowded.store)
    assert crowded.tokens([again], **settings) == crowded.engines([again], **settings)
    crowded.assert_nothing_left_behind()
