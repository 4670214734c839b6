"""Reuse inside real vLLM: answers are those of the embedded engine, and requests without reuse are as without the connector."""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cachetune_rag import CacheTune
from cachetune_rag.text.prompts.segments import Prompt, Span
from cachetune_rag.text.recognising.id_spans import without_beginning
from cachetune_vllm.engines import Engines
from cachetune_vllm.measured import Measured
from tests import tiny
from tests.vllm.conftest import TinyVLLM

TOKENS = 10
PAGE = 128
"""Tokens in a page of vLLM's cache on a CPU."""
ON_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU, both attentions round in their own way")
WORDS = random.Random(0)
CHUNKS = ["".join(WORDS.choices(string.ascii_lowercase + "  ", k=100 + 10 * n)).strip() for n in range(6)]
SETTINGS = pytest.mark.parametrize(
    ("selector", "ratio"), [("frequency", 0.15), ("expected_error", 0.05), ("expected_error", 0.3), ("none", 0.0)]
)


def encode(text: str) -> list[int]:
    return list(tiny.tokenizer()(text, add_special_tokens=False).input_ids)


def prompt_of(chunks: list[str], query: str = "What is it?", opening: str = "<s>Answer from these.") -> Prompt:
    """A prompt as a client's template would make it, and where the chunks stand in it."""
    ids, spans = encode(opening + "\n\n"), []
    for number, chunk in enumerate(chunks):
        spans.append(Span(len(ids), len(ids) + len(encode(chunk)), number))
        ids += encode(chunk + "\n\n")
    ids += encode(f"Question: {query}\nAnswer:")
    return Prompt(tuple(ids), tuple(spans), tuple(tuple(encode(c)) for c in chunks), tuple(chunks))


def with_chunks(prompt: Prompt, numbers: list[int]) -> Prompt:
    """The prompt with these of its chunks; the others are any text."""
    return Prompt(
        prompt.ids,
        tuple(Span(s.start, s.end, k) for k, s in enumerate(prompt.spans[n] for n in numbers)),
        tuple(prompt.chunk_ids[n] for n in numbers),
        tuple(prompt.chunk_texts[n] for n in numbers),
    )


HEADER = encode(" ".join(WORDS.choices(["read", "the", "notes", "with", "care", "and", "say", "which"], k=40)))
"""Instructions that fill more than a page."""


def under_header(seed: int) -> Prompt:
    """A prompt that begins as many others do."""
    prompt = shuffled(seed)
    spans = tuple(replace(s, start=s.start + len(HEADER), end=s.end + len(HEADER)) for s in prompt.spans)
    return replace(prompt, ids=(*HEADER, *prompt.ids), spans=spans)


def shuffled(seed: int, count: int = 4) -> Prompt:
    return prompt_of(random.Random(seed).sample(CHUNKS, count), f"What is {seed}?")


@dataclass
class Served:
    """A vLLM with the connector, and the engine on the same files and store."""

    tiny: TinyVLLM
    store: Path

    def params(self, more: dict[str, Any] | None = None, **asked: Any) -> Any:
        """vLLM's settings of a request; `asked` are the connector's."""
        from vllm import SamplingParams

        extra = {"kv_transfer_params": {"cachetune": asked}} if asked else None
        settings = {"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True, "detokenize": False} | (more or {})
        return SamplingParams(extra_args=extra, **settings)

    def ask(self, prompts: list[Prompt], more: dict[str, Any] | None = None, **asked: Any) -> list[Any]:
        """vLLM's results; `asked` are settings of the requests."""
        params = self.params(more, **asked)
        inputs = [{"prompt_token_ids": list(prompt.ids)} for prompt in prompts]
        return list(self.tiny.llm.generate(inputs, params, use_tqdm=False))

    def tokens(self, prompts: list[Prompt], **asked: Any) -> list[list[int]]:
        return [list(out.outputs[0].token_ids) for out in self.ask(prompts, **asked)]

    def plain(self, prompts: list[Prompt]) -> list[list[int]]:
        return self.tokens(prompts, reuse=False)

    def engines(
        self, prompts: list[Prompt], *, tokens: int = TOKENS, allowed: list[int] | None = None, **settings: Any
    ) -> list[list[int]]:
        """What the embedded engine answers, in so many tokens, each one of the allowed ones."""
        with CacheTune(self.tiny.reference, tiny.tokenizer(), self.store) as engine:
            return [
                follow(engine, engine.prefill(prompt=prompt, **settings), tokens, allowed or []) for prompt in prompts
            ]

    def know_the_store(self) -> None:
        """Wait until all chunks that the store has are recognised."""
        assert self.scheduler.connector.recognition.catch_up(60)

    @property
    def scheduler(self) -> Any:
        return self.tiny.llm.llm_engine.engine_core.engine_core.scheduler

    def assert_first_tokens_as_likely(self, selector: str, ratio: float) -> None:
        """On a GPU: first tokens are about as likely as in the embedded engine."""
        prompts = [shuffled(seed) for seed in range(100, 104)]
        outs = self.ask(prompts, more={"max_tokens": 1, "logprobs": 20}, selector=selector, ratio=ratio)
        model = self.tiny.reference.to("cuda")
        with CacheTune(model, tiny.tokenizer(), self.store) as engine:
            for prompt, out in zip(prompts, outs, strict=True):
                assert report(out)["reused"] > 0
                wanted = engine.prefill(prompt=prompt, selector=selector, ratio=ratio).logits[0].float().log_softmax(-1)
                for token, entry in out.outputs[0].logprobs[0].items():
                    assert entry.logprob == pytest.approx(float(wanted[token]), abs=0.05)
        self.assert_nothing_left_behind()

    def assert_given_up_while_loading(self, prompts: list[Prompt], **asked: Any) -> None:
        """The first four of six requests are aborted while their prompts are put together: the others are answered, and nothing
        stays behind."""
        core, params = self.tiny.llm.llm_engine, self.params({"max_tokens": 4, "ignore_eos": False}, **asked)
        for number, prompt in enumerate(prompts):
            core.add_request(f"r{number}", {"prompt_token_ids": list(prompt.ids)}, params)
        core.step()
        core.abort_request([f"r{number}" for number in range(4)])
        answered = set()
        while core.has_unfinished_requests():
            ended = [out for out in core.step() if out.finished]
            answered |= {out.request_id for out in ended if out.outputs[0].finish_reason == "length"}
        assert {name.split("-")[0] for name in answered} == {"r4", "r5"}
        self.tokens([shuffled(9)])  # a step behind, in which vLLM hears that loads of aborted requests ended
        self.assert_nothing_left_behind()

    def assert_nothing_left_behind(self) -> None:
        from vllm.distributed.kv_transfer import has_kv_transfer_group

        pool = self.scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1  # vLLM keeps one for itself
        assert not self.scheduler.requests
        if has_kv_transfer_group():  # several workers are processes of their own
            assert engines_of_worker().store.stats().disk.pinned == 0


def engines_of_worker() -> Engines:
    """What the worker in this process works with."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    engines: Engines = get_kv_transfer_group().engines  # type: ignore[attr-defined]
    return engines


@torch.no_grad()
def follow(engine: CacheTune, state: Any, tokens: int, allowed: list[int]) -> list[int]:
    """Greedy tokens behind a prompt's keys and values; no others than the allowed ones, if any are given."""
    step, logits, made = engine.runtime.adapter.steps(state.cache), state.logits, []
    while True:
        made.append(allowed[int(logits[0][allowed].argmax())] if allowed else int(logits[0].argmax()))
        if len(made) == tokens:
            return made
        logits = step(made[-1])


def report(out: Any) -> dict[str, Any]:
    said: dict[str, Any] = out.kv_transfer_params["cachetune"]
    return said


def transfer(store: Path, **settings: Any) -> dict[str, Any]:
    return {
        "kv_connector": "CacheTuneConnector",
        "kv_connector_module_path": "cachetune_vllm",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"store": str(store), "least_reused": 16, **settings},
    }


def filled_store(folder: Path, family: str = "llama", **options: Any) -> tuple[Path, Path]:
    """A tiny model's files, and a store with `CHUNKS` of it. `options` are the engine's."""
    from transformers import AutoModelForCausalLM

    from tests.vllm.models import save_tiny

    model, store = save_tiny(family, folder), folder / "kv"
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with CacheTune(loaded, tiny.tokenizer(), store, **options) as engine:
        engine.precompute(CHUNKS)
    return model, store


@pytest.fixture(scope="module")
def served(tiny_vllm: Callable[..., TinyVLLM], tmp_path_factory: pytest.TempPathFactory) -> Served:
    _, store = filled_store(tmp_path_factory.mktemp("served"))
    up = tiny_vllm("llama", packed=False, kv_transfer_config=transfer(store), enable_prefix_caching=True)
    return Served(up, store)


def test_the_engine_is_made_ready_once_when_vllm_starts(served: Served) -> None:
    # 15% of the longest prompt, and what stands around it
    assert list(served.tiny.warmed) == [(820, [2048], "auto", 820)]


@ON_CPU
@SETTINGS
def test_answers_are_those_of_the_embedded_engine(served: Served, selector: str, ratio: float) -> None:
    prompts = [shuffled(seed) for seed in range(4)]
    found = served.ask(prompts, selector=selector, ratio=ratio)
    assert [list(out.outputs[0].token_ids) for out in found] == served.engines(prompts, selector=selector, ratio=ratio)
    chunk_tokens = [sum(span.end - span.start for span in prompt.spans) for prompt in prompts]
    assert [report(out)["reused"] + report(out)["recomputed"] for out in found] == chunk_tokens
    assert [out.num_cached_tokens for out in found] == [report(out)["reused"] for out in found]
    served.assert_nothing_left_behind()


def test_all_recomputed_gives_vllms_own_answer(served: Served) -> None:
    prompts = [shuffled(seed) for seed in range(10, 14)]
    assert served.tokens(prompts, ratio=1.0) == served.plain(prompts)


@ON_CPU
def test_a_request_without_reuse_never_sees_reused_pages(served: Served) -> None:
    prompts = [shuffled(seed) for seed in range(20, 24)]
    reused = served.tokens(prompts, selector="none", ratio=0)
    plain = served.plain(prompts)
    assert plain != reused  # otherwise this test could not tell
    assert served.plain(prompts) == plain
    want = [served.tiny.reference_tokens(list(prompt.ids), TOKENS) for prompt in prompts]
    assert plain == want


@ON_CPU
def test_settings_of_one_request_are_not_those_of_the_next(served: Served) -> None:
    prompt = shuffled(30)
    for ratio in (0.0, 0.3, 0.0):
        assert served.tokens([prompt], selector="frequency", ratio=ratio) == served.engines(
            [prompt], selector="frequency", ratio=ratio
        )


@ON_CPU
@pytest.mark.parametrize(
    "chunks",
    [
        CHUNKS[:1],
        [CHUNKS[0], CHUNKS[1], CHUNKS[0]],
        [CHUNKS[2], "This passage was never stored anywhere, as far as I know.", CHUNKS[3]],
    ],
    ids=["one", "repeated", "partly stored"],
)
def test_any_chunks_in_any_order(served: Served, chunks: list[str]) -> None:
    prompt = prompt_of(chunks)
    known = with_chunks(prompt, [n for n, chunk in enumerate(chunks) if chunk in CHUNKS])
    settings = {"selector": "expected_error", "ratio": 0.15}
    assert served.tokens([prompt], **settings) == served.engines([known], **settings)


@ON_CPU
def test_tokens_that_vllm_has_cached_are_taken_as_they_are(served: Served) -> None:
    """Also where they are part of a chunk: a prompt's beginning is better exact than reused."""
    settings = {"selector": "frequency", "ratio": 0.15}
    for prompt, cached in ((under_header(50), PAGE), (prompt_of(CHUNKS[:4], "Whole?"), 2 * PAGE)):
        other = [*prompt.ids[:cached], *encode("something else altogether")]
        served.plain([Prompt(tuple(other), (), (), ())])
        out = served.ask([prompt], **settings)[0]
        assert report(out)["prefix_kept"] == cached
        assert [list(out.outputs[0].token_ids)] == served.engines([without_beginning(prompt, cached)], **settings)
        assert report(served.ask([prompt], **settings)[0])["left"] == "same prompt"
    served.assert_nothing_left_behind()


@ON_CPU
def test_pages_that_are_filled_in_the_same_step_are_not_read_too_early(served: Served) -> None:
    prompts = [under_header(seed) for seed in (51, 52)]
    settings = {"selector": "frequency", "ratio": 0.15}
    alone = served.engines(prompts[1:], **settings)
    params = [served.params(reuse=False), served.params(**settings)]
    inputs = [{"prompt_token_ids": list(prompt.ids)} for prompt in prompts]
    out = served.tiny.llm.generate(inputs, params, use_tqdm=False)[1]
    assert report(out)["prefix_kept"] == PAGE
    assert [list(out.outputs[0].token_ids)] == alone


def test_a_prompt_that_vllm_has_cached_is_left_to_it(served: Served) -> None:
    prompt = shuffled(53)
    plain = served.plain([prompt])
    out = served.ask([prompt], selector="none", ratio=0)[0]
    assert report(out)["left"] == "cached"
    assert [list(out.outputs[0].token_ids)] == plain
    page = served.tiny.llm.llm_engine.vllm_config.cache_config.block_size
    assert out.num_cached_tokens == len(prompt.ids) // page * page


def steps_of(served: Served, prompt: Prompt, monkeypatch: pytest.MonkeyPatch, **asked: Any) -> list[Any]:
    """What vLLM plans and runs for one request alone: the tokens of each step, and what the connector's worker is told with it."""
    core = served.tiny.llm.llm_engine.engine_core.engine_core
    steps: list[Any] = []
    schedule, execute = core.scheduler.schedule, core.model_executor.execute_model

    def noted(*given: Any) -> Any:
        planned = schedule(*given)
        told = planned.kv_connector_metadata
        nothing = told is None or not (told.loads or told.missed or told.given_up)
        steps.append(("planned", list(planned.num_scheduled_tokens.values()), nothing))
        return planned

    def run(planned: Any, *more: Any, **others: Any) -> Any:
        steps.append(("run", planned.total_num_scheduled_tokens))
        return execute(planned, *more, **others)

    with monkeypatch.context() as patch:
        patch.setattr(core.scheduler, "schedule", noted)
        patch.setattr(core.model_executor, "execute_model", run)
        (out,) = served.ask([prompt], more={"max_tokens": 3}, **asked)
    if asked:
        steps.append(report(out)["left"])
    return steps


def test_a_request_that_is_left_to_vllm_takes_the_steps_that_it_takes_without_the_connector(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    few, other = prompt_of(CHUNKS[:1], "Too few?"), prompt_of(["x" * len(CHUNKS[0])], "Too few?")
    steps = [("planned", [len(few.ids)], True), ("run", len(few.ids)), *[("planned", [1], True), ("run", 1)] * 2]
    settings = {"selector": "frequency", "ratio": 0.95}  # 5 tokens would be spared
    assert steps_of(served, few, monkeypatch, **settings) == [*steps, "few"]
    assert steps_of(served, other, monkeypatch, **settings) == [*steps, "nothing found"]
    # Its pages are those of any request, and found by one that knows nothing of reuse.
    assert served.ask([few], reuse=False)[0].num_cached_tokens == len(few.ids) // PAGE * PAGE > 0
    served.tiny.llm.reset_prefix_cache()
    with monkeypatch.context() as without:
        without.setattr(served.scheduler, "connector", None)
        for module in ("gpu_model_runner", "kv_connector_model_runner_mixin"):
            without.setattr(f"vllm.v1.worker.{module}.has_kv_transfer_group", lambda: False)
        assert steps_of(served, few, monkeypatch) == steps
    served.assert_nothing_left_behind()


def test_the_outcome_of_every_step_and_prompt_is_heard_of_in_order(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is measured of them decides over later requests. A prompt whose chunks had to be read from disk doesn't count, so they are in memory."""
    prompt = shuffled(95)
    engines_of_worker().default.executor.prefetch(lambda: prompt.chunk_ids).wait(60)
    begun: list[int] = []
    heard: list[tuple[str, Any]] = []
    begin, end, load_end = Measured.step_begins, Measured.step_ends, Measured.load_ends

    def begins(self: Measured, tokens: int) -> int:
        begun.append(begin(self, tokens))
        return begun[-1]

    def ends(self: Measured, number: int) -> None:
        heard.append(("step", number))
        end(self, number)

    def load_ends(self: Measured, request_id: str, reused: int | None) -> None:
        heard.append(("load", reused))
        load_end(self, request_id, reused)

    monkeypatch.setattr(Measured, "step_begins", begins)
    monkeypatch.setattr(Measured, "step_ends", ends)
    monkeypatch.setattr(Measured, "load_ends", load_ends)
    (out,) = served.ask([prompt], more={"max_tokens": 2}, selector="frequency", ratio=0.15)
    served.ask([shuffled(96)], more={"max_tokens": 2}, reuse=False)
    assert heard == [("load", report(out)["reused"]), *(("step", number) for number in begun)]
    assert len(begun) == 4


def test_named_chunks_that_are_all_missed_are_stored_behind_the_request(served: Served) -> None:
    texts = [f"Note {n} that nobody has precomputed, and that should be stored once it was asked for." for n in (1, 2)]
    prompt = prompt_of(texts)
    settings = {"selector": "expected_error", "ratio": 0.15, "chunks": texts}
    first = served.ask([prompt], **settings)[0]
    said = report(first)
    assert (said["left"], said["missed"], said["storing"]) == ("missed", sum(len(encode(text)) for text in texts), 2)
    assert [list(first.outputs[0].token_ids)] == served.plain([prompt])
    assert engines_of_worker().default.backfill.wait(60)
    served.know_the_store()
    served.tiny.llm.reset_prefix_cache()
    again = prompt_of(texts, "And the second time?")
    second = report(served.ask([again], **settings)[0])
    assert (second["missed"], second["reused"] + second["recomputed"]) == (0, said["missed"])


def test_engines_of_tenants_are_bounded(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cachetune_vllm.engines.TENANTS", 3)
    engines = engines_of_worker()
    made = {name: engines.of(name) for name in "abc"}
    assert made["a"].lifetime.closed
    assert not engines.default.lifetime.closed
    assert engines.of("b") is made["b"]
    engines.of("d")
    assert made["c"].lifetime.closed
    assert not made["b"].lifetime.closed


def test_a_prompt_without_stored_chunks_is_vllms_alone(served: Served) -> None:
    prompt = prompt_of(["Nothing of this text is in the store, and none of it ever was."])
    out = served.ask([prompt], ratio=0.15)[0]
    assert report(out) == {"reused": 0, "left": "nothing found"}
    assert [list(out.outputs[0].token_ids)] == served.plain([prompt])


@ON_CPU
def test_many_requests_at_once(served: Served) -> None:
    prompts = [shuffled(seed, count=3) for seed in range(40, 72)]
    settings = {"selector": "frequency", "ratio": 0.15}
    assert served.tokens(prompts, **settings) == served.engines(prompts, **settings)
    served.assert_nothing_left_behind()


@ON_CPU
def test_a_chunk_on_disk_that_waiting_requests_share_is_read_once(served: Served) -> None:
    shared = "A passage that several requests wait for at one time, and that is in no memory yet."
    with CacheTune(served.tiny.reference, tiny.tokenizer(), served.store) as engine:
        engine.precompute([shared])
    served.know_the_store()
    prompts, settings = [prompt_of([shared], f"Is it {n}?") for n in range(4)], {"selector": "none", "ratio": 0}
    outs = served.ask(prompts, **settings)
    assert [set(report(out).get("bytes_read", report(out))) for out in outs] == [{"disk"}, {"host"}, {"host"}, {"host"}]
    assert [list(out.outputs[0].token_ids) for out in outs] == served.engines(prompts, **settings)
    served.assert_nothing_left_behind()


def test_settings_that_cannot_be_used_leave_a_request_to_vllm_and_say_why(served: Served) -> None:
    prompt = shuffled(80)
    out = served.ask([prompt], ratio=3)[0]
    assert report(out)["left"] == "settings"
    assert "ratio is 3" in report(out)["error"]
    assert [list(out.outputs[0].token_ids)] == served.plain([prompt])


@ON_CPU
def test_a_bound_takes_the_least_ratio_that_is_predicted_to_keep_it(served: Served) -> None:
    early = "expected_error_early"
    unknown, kept, out_of_reach = shuffled(90), shuffled(91), shuffled(92)
    out = served.ask([unknown], max_kl=0.1, selector="probe")[0]
    assert report(out)["left"] == "bound", "nothing was calibrated"
    assert [list(out.outputs[0].token_ids)] == served.plain([unknown])
    with CacheTune(served.tiny.reference, tiny.tokenizer(), served.store) as engine:
        try:
            samples = [shuffled(seed) for seed in range(100, 112)]
            calibration = engine.calibrate(samples, selector=early, ratios=(0, 0.1, 0.5, 1), tokens=1, bound=100)
            # The server has looked for what is calibrated when it started.
            engines_of_worker().default.calibrations.save(calibration)
            ladder = engine.prefill(prompt=kept, selector=early, max_kl=0).report.prediction.ladder  # type: ignore[union-attr]
            state = engine.prefill(prompt=kept, selector=early, max_kl=ladder[-1].kl)
            wanted = state.report
            tokens = follow(engine, state, TOKENS, [])
            bounded = served.ask([kept], selector=early, max_kl=ladder[-1].kl)[0]
            whole = served.ask([out_of_reach], selector=early, max_kl=0)[0]
        finally:
            for profile in served.store.glob("profiles/calibration-*"):
                profile.unlink()
    said = report(bounded)
    assert said["ratio"] == said["prediction"]["ratio"] == wanted.ratio < 1
    assert (said["reused"], said["recomputed"]) == (wanted.reused, wanted.recomputed)
    assert said["prediction"]["ladder"][-1]["kl"] == pytest.approx(ladder[-1].kl, rel=1e-3)
    assert list(bounded.outputs[0].token_ids) == tokens
    assert report(whole)["left"] == "bound"
    assert report(whole)["prediction"]["why"].startswith("full prefill, because even at r=0.5")
    assert [list(whole.outputs[0].token_ids)] == served.plain([out_of_reach])
    served.assert_nothing_left_behind()


def test_a_report_counts_what_goes_on_with_a_sentence(served: Served) -> None:
    """It is told by token ids, which are all that a server has."""
    more = "Nobody knows it, and nobody asks for it, since the mill has been shut for longer than anybody remembers. "
    cut = [f"The mill is old. {more}The code of the mill", f"is 48213. {more}It has a door."]
    served.ask([prompt_of(cut)], chunks=cut)
    assert engines_of_worker().default.backfill.wait(60)
    served.know_the_store()
    served.tiny.llm.reset_prefix_cache()
    said = report(served.ask([prompt_of(cut, "And the second time?")], selector="frequency", ratio=0.3)[0])
    assert "left" not in said, said
    assert said["continued"] == len("is 48213.")
    assert not said["advice"]


@pytest.mark.gpu
@SETTINGS
def test_on_a_gpu_first_tokens_are_as_likely_as_in_the_engine(served: Served, selector: str, ratio: float) -> None:
    served.assert_first_tokens_as_likely(selector, ratio)
