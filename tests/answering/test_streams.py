"""Streams that don't end as they should: given up, dropped, failing, shared; and logits that are no numbers."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from interrupting import interrupted_at
from tiny import llama, tokenizer
from transformers import LogitsProcessorList

from cachetune_rag import CacheTune, CacheTuneError, ConfigError, Document, NonFiniteLogitsError
from cachetune_rag.answering import stream as stream_module
from cachetune_rag.answering.decoding import TextStream
from cachetune_rag.telemetry import RequestObserver

CHUNKS = ["The lighthouse was built in 1871.", "Its lamp burned whale oil until 1902."]
ENDS: dict[str, Any] = {"max_new_tokens": 8, "eos_token_id": []}


@pytest.fixture
def engine() -> Iterator[CacheTune]:
    with CacheTune(llama(), tokenizer(), lead_in="first_token") as made:
        yield made


def stored(engine: CacheTune) -> list[bool]:
    return [engine.store.contains(engine.runtime.assembler.key(engine.prompts.encode(text))) for text in CHUNKS]


def test_closed_early_it_keeps_what_it_missed(engine: CacheTune) -> None:
    with engine.stream("Who?", CHUNKS, **ENDS) as stream:
        next(stream)
    assert (stream.report.storing, stream.report.unstored) == (2, 0)
    assert engine.flush(60)
    assert (stored(engine), engine.stats().unstored) == ([True, True], 0)


def test_held_by_nobody_it_ends_at_once_and_keeps_what_it_missed(engine: CacheTune) -> None:
    gc.disable()
    try:
        for _ in engine.stream("Who?", CHUNKS, **ENDS):
            break
        assert not engine.runtime.model.lock.wanted
        assert engine.flush(60)
    finally:
        gc.enable()
    assert stored(engine) == [True, True]


def test_collected_amid_anything_it_waits_for_no_lock(engine: CacheTune) -> None:
    stream = engine.stream("Who?", CHUNKS, **ENDS)
    next(stream)
    with engine.runtime.backfill.queue.mutex:  # as if the collector ran right inside of it
        del stream
    assert engine.flush(60)
    assert stored(engine) == [True, True]


@pytest.mark.parametrize("lock", ["model's users", "model", "fidelity"])
def test_collected_inside_of_any_lock_it_ends(lock: str) -> None:
    """On a thread of its own, so that a lock which waits for itself fails the test rather than the suite."""
    with CacheTune(llama(), tokenizer(), lead_in="first_token", fidelity_sample=1.0) as engine:
        stream = engine.stream("Who?", CHUNKS, **ENDS)
        next(stream)
        held = [stream]
        del stream
        mutex: Any = {
            "model's users": engine.runtime.model.lock.mutex,
            "model": engine.runtime.model.lock,
            "fidelity": engine.runtime.fidelity.queue.mutex,
        }[lock]

        def collect() -> None:
            with mutex:
                held.clear()

        thread = threading.Thread(target=collect, daemon=True)
        thread.start()
        thread.join(60)
        assert not thread.is_alive()
        assert not engine.runtime.model.lock.wanted
        assert engine.flush(60)
        assert stored(engine) == [True, True]


def test_failing_it_keeps_what_it_missed(engine: CacheTune) -> None:
    def fail(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        raise OSError("of the caller's own")

    for processor in (fail, lambda ids, scores: torch.full_like(scores, torch.nan)):
        with pytest.raises((OSError, ConfigError), match=r"of the caller's own|leave no token to choose"):
            engine.generate("Who?", CHUNKS, logits_processor=[processor], **ENDS)
    assert engine.flush(60)
    assert stored(engine) == [True, True]
    assert engine.stats().requests == 0  # neither was served


def test_one_thread_reads_it_at_a_time(engine: CacheTune) -> None:
    inside, go_on = threading.Event(), threading.Event()

    def wait(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        inside.set()
        assert go_on.wait(60)
        return scores

    stream = engine.stream("Who?", CHUNKS, logits_processor=[wait], **ENDS)
    reader = threading.Thread(target=lambda: list(stream))
    reader.start()
    assert inside.wait(60)
    for use in (lambda: next(stream), stream.close):
        with pytest.raises(CacheTuneError, match="one thread at a time"):
            use()
    go_on.set()
    reader.join(60)
    assert stream.answer.completion_tokens == 8


def test_an_interrupt_at_any_line_is_told_as_one_and_leaves_nothing_behind(engine: CacheTune) -> None:
    engine.precompute([Document("a", CHUNKS)])
    for step in range(500):
        error = interrupted_at(step, stream_module, lambda: engine.generate("Who?", CHUNKS[:1], max_new_tokens=1))
        if error is None:
            break
        assert isinstance(error, KeyboardInterrupt), step
        assert not engine.runtime.model.lock.wanted, step
        assert not engine.store.stats().host.pinned, step
    assert 30 < step < 499


def test_it_cant_be_copied(engine: CacheTune) -> None:
    stream = engine.stream("Who?", CHUNKS, **ENDS)
    for made in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(CacheTuneError, match=r"can't be pickled or copied.*send its answer"):
            made(stream)


class Told(RequestObserver):
    def __init__(self) -> None:
        self.reports: list[Any] = []

    def prefilled(self, report: Any) -> None:
        self.reports.append(report)


def test_time_to_first_token_has_the_choosing_in_it(engine: CacheTune) -> None:
    told = Told()
    engine.observers.add(told)
    slow = threading.Event()

    def choose(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        slow.wait(0.2)
        return scores

    report = engine.generate("Who?", CHUNKS, logits_processor=[choose], max_new_tokens=1).report
    assert told.reports[0].ttft == report.ttft == engine.stats().ttft_seconds
    assert report.ttft >= report.timings["choose"] >= 0.19
    assert sum(report.timings.values()) <= report.ttft
    assert sum(h.count for h in engine.ttft_histograms().values()) == 1


@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "seed": 1}], ids=["greedy", "sampling"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_said_so(engine: CacheTune, sampling: dict[str, Any], value: float) -> None:
    def overflow(_module: Any, _args: Any, logits: torch.Tensor) -> torch.Tensor:
        return logits.index_fill(-1, torch.tensor([5]), value)

    # Not by its weights: changed ones are refused, and so are those that are no numbers.
    engine.adapter.view.lm_head.register_forward_hook(overflow)
    requests: list[Any] = [
        lambda: engine.generate("Who?", CHUNKS, **sampling),
        lambda: engine.prefill("Who?", CHUNKS),
        lambda: engine.full_prefill("Who?", CHUNKS),
    ]
    for request in requests:
        with pytest.raises(NonFiniteLogitsError, match="logits are no numbers"):
            request()
    assert (engine.stats().requests, engine.stats().full_prefills) == (0, 0)


# -- stop strings with special tokens in them ---------------------------------------------------------------------------


@pytest.mark.parametrize("stop", ["<|im_end|>", "s.<|im_end|>", "<|im_end|>x", "<|im_end|><|im_start|>", ".<|im_"])
@pytest.mark.parametrize("pad", ["", "y" * 200])
def test_a_special_token_stops_where_transformers_stops(engine: CacheTune, stop: str, pad: str) -> None:
    start, end = engine.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    words = [*engine.prompts.encode(f"{pad}Yes."), end, *engine.prompts.encode("xs."), start, end, start, end]
    prompt = engine.prompts.build(query="Who?", chunks=[])

    def say(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        chosen = torch.full_like(scores, -1e9)
        chosen[:, words[ids.shape[1] - len(prompt.ids)]] = 0
        return chosen

    ids, most = torch.tensor([prompt.ids]), len(words)
    theirs = engine.adapter.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=most,
        logits_processor=LogitsProcessorList([say]),  # type: ignore[list-item]
        stop_strings=[stop],
        tokenizer=engine.tokenizer,
        pad_token_id=2,
    )[0, len(prompt.ids) :].tolist()
    with engine.stream(prompt=prompt, max_new_tokens=most, stop=stop, logits_processor=[say]) as stream:
        pieces = list(stream)
    assert (list(stream.answer.token_ids), stream.answer.finish_reason) == (theirs, "stop")
    whole = engine.tokenizer.decode(theirs)
    shown = whole[: whole.index(stop)].replace("<|im_end|>", "").replace("<|im_start|>", "")
    assert "".join(pieces) == stream.answer.text == shown


def test_every_token_is_put_into_text_once(engine: CacheTune, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: list[int] = []
    push = TextStream.push
    monkeypatch.setattr(TextStream, "push", lambda self, token: pushed.append(token) or push(self, token))
    answer = engine.generate("Who?", CHUNKS, stop="never to be seen", **ENDS)
    assert pushed == list(answer.token_ids)
