"""Answers that are not sure: the prompt is read again without reuse, and the answer goes on behind that, in exact arithmetic."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry
from tiny import llama, tokenizer

from cachetune_rag import Answer, CacheTune, ConfigError, Document, EngineClosedError, ModelChangedError
from cachetune_rag.answering import executor as executor_module
from cachetune_rag.reuse.state import PrefillState
from cachetune_rag.telemetry.prometheus import CacheTuneCollector
from cachetune_store import ChunkStore

CHUNKS = ["The lighthouse was built in 1871.", "Its lamp burned whale oil until 1902.", "Visitors climb 214 steps."]
QUERIES = ["Who?", "How many steps are there?", "What did the lamp burn?", "?"]
TOKENS = 24
WAYS: list[dict[str, Any]] = [
    {"selector": "none", "ratio": 0.0},
    {"selector": "frequency", "ratio": 0.3},
    {"selector": "expected_error", "ratio": 0.15},
]


@pytest.fixture
def engine() -> Iterator[CacheTune]:
    with CacheTune(llama(), tokenizer()) as made:
        made.precompute([Document("a", CHUNKS)])
        yield made


def answer(engine: CacheTune, query: str = QUERIES[0], **options: Any) -> Answer:
    settings: dict[str, Any] = {"max_new_tokens": TOKENS, "eos_token_id": [], "do_sample": False}
    return engine.generate(query, CHUNKS, **{**settings, **options})


def sure_of(engine: CacheTune, query: str, said: Answer, **way: Any) -> list[float]:
    """The probability of the likeliest token behind each token of an answer with reuse, and before the first one."""
    state = engine.prefill(query, CHUNKS, **way)
    ids = torch.tensor([said.token_ids[:-1]])
    out = engine.adapter.model(input_ids=ids, **{engine.adapter.model_forward.cache_argument: state.cache})
    return torch.cat([state.logits, out.logits[0]]).softmax(-1).amax(-1).tolist()


def goes_on(engine: CacheTune, query: str, said: tuple[int, ...]) -> list[int]:
    """How transformers itself goes on with an answer behind the whole prompt."""
    ids = torch.tensor([[*engine.prompts.build(query=query, chunks=CHUNKS).ids, *said]])
    more = TOKENS - len(said)
    out = engine.adapter.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=more,
        do_sample=False,
        pad_token_id=2,
        eos_token_id=None,
    )
    return out[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "seed": 5}, {"repetition_penalty": 1.3}])
@pytest.mark.parametrize("way", WAYS)
def test_who_wants_to_be_quite_sure_gets_the_answer_of_full_prefill(
    engine: CacheTune, way: dict[str, Any], sampling: dict[str, Any]
) -> None:
    without = [answer(engine, query, **way, **sampling).token_ids for query in QUERIES]
    whole = [answer(engine, query, reuse=False, **sampling).token_ids for query in QUERIES]
    assert without != whole
    found = [answer(engine, query, **way, **sampling, min_sure=1.0) for query in QUERIES]
    assert [each.token_ids for each in found] == whole
    for each in found:
        again = each.report.read_again
        assert again is not None
        assert (again.token, again.min_sure, again.tokens) == (0, 1.0, each.report.prompt_tokens)
        assert each.report.ttft > again.seconds == each.report.timings["read_again"] > 0
        assert each.report.timings["choose"] > 0
        assert each.report.reused > 0
        assert not each.report.full


@pytest.mark.parametrize("way", WAYS)
def test_at_the_first_unsure_token_the_answer_goes_on_behind_full_prefill(
    engine: CacheTune, way: dict[str, Any]
) -> None:
    places = set()
    for query in QUERIES:
        plain = answer(engine, query, **way)
        sure = sure_of(engine, query, plain, **way)
        for place in range(TOKENS):
            least = sure[place] + 1e-6
            if least > min([1.0, *sure[:place]]):
                continue  # an earlier one is less sure
            found = answer(engine, query, **way, min_sure=least)
            again = found.report.read_again
            assert again is not None
            assert again.token == place
            assert again.sure == pytest.approx(sure[place], abs=1e-5)
            assert again.tokens == found.report.prompt_tokens + place
            assert ("read_again" in found.report.timings) == (place == 0)
            said = plain.token_ids[:place]
            assert list(found.token_ids) == [*said, *goes_on(engine, query, said)]
            assert found.text == "".join(engine.tokenizer.decode(found.token_ids, skip_special_tokens=True))
            places.add(place)
    assert len(places) > 3
    assert 0 in places


@pytest.mark.parametrize("min_sure", [0, 0.0, None])
def test_without_a_bound_nothing_is_read_again(engine: CacheTune, min_sure: float | None) -> None:
    plain = answer(engine, **WAYS[0])
    found = answer(engine, **WAYS[0], min_sure=min_sure)
    assert (found.token_ids, found.report.read_again) == (plain.token_ids, None)
    assert (engine.stats().read_again, engine.stats().read_again_tokens) == (0, 0)


def middle(engine: CacheTune, query: str = QUERIES[0]) -> float:
    """A bound by which this query's prompt is read again in the middle of the answer without recompute."""
    sure = sure_of(engine, query, answer(engine, query, **WAYS[0]), **WAYS[0])
    place = next(i for i in range(2, TOKENS) if sure[i] < min(sure[:i]))
    return sure[place] + 1e-6


def test_a_stream_gives_no_text_twice_and_says_so_in_its_report(engine: CacheTune) -> None:
    least = middle(engine)
    whole = answer(engine, **WAYS[0], min_sure=least)
    with engine.stream(
        QUERIES[0], CHUNKS, **WAYS[0], min_sure=least, max_new_tokens=TOKENS, eos_token_id=[], do_sample=False
    ) as pieces:
        next(pieces)
        assert pieces.report.read_again is None
        rest = list(pieces)
        again = pieces.report.read_again
        assert again is not None
        assert again.token > 1
        assert pieces.answer.report == pieces.report
    assert pieces.answer.token_ids == whole.token_ids
    assert pieces.answer.text.endswith("".join(rest))
    assert pieces.answer.text == whole.text
    told = str(pieces.report)
    assert (
        f"read again in full before token {again.token} of the answer, of which the model was {again.sure:.0%} sure"
        in told
    )
    assert pieces.report.as_dict()["read_again"] == {
        "token": again.token,
        "sure": again.sure,
        "min_sure": least,
        "tokens": again.tokens,
        "seconds": again.seconds,
    }


def test_it_is_counted(engine: CacheTune) -> None:
    least = middle(engine)
    first, second = (
        answer(engine, query, **WAYS[0], min_sure=bound) for query, bound in ((QUERIES[0], least), (QUERIES[1], 1.0))
    )
    answer(engine, **WAYS[0], reuse=False, min_sure=1.0)
    tokens = first.report.read_again.tokens + second.report.read_again.tokens  # type: ignore[union-attr]
    stats = engine.stats()
    assert (stats.read_again, stats.read_again_tokens, stats.full_prefills) == (2, tokens, 1)
    registry = CollectorRegistry()
    registry.register(CacheTuneCollector(engine))
    assert registry.get_sample_value("cachetune_prompts_read_again_total") == 2
    assert registry.get_sample_value("cachetune_tokens_read_again_total") == tokens


@pytest.mark.parametrize("min_sure", [1.5, -0.1, "high", True, float("nan")])
@pytest.mark.parametrize("reuse", [True, False])
def test_what_is_no_probability_is_refused(engine: CacheTune, min_sure: Any, reuse: bool) -> None:
    with pytest.raises(
        ConfigError, match=r"min_sure is .*: use a probability from 0 \(never read again\) to 1, or None for never"
    ):
        answer(engine, min_sure=min_sure, reuse=reuse)


def test_what_is_computed_whole_is_not_read_again(engine: CacheTune) -> None:
    assert answer(engine, ratio=1.0, min_sure=1.0).report.read_again is None
    assert answer(engine, reuse=False, min_sure=1.0).report.read_again is None
    found = engine.generate("Who?", ["Nothing of this is stored."], min_sure=1.0, max_new_tokens=4)
    assert (found.report.reused, found.report.read_again) == (0, None)


def test_a_missing_chunk_is_stored_behind_the_answer(engine: CacheTune) -> None:
    chunks = [*CHUNKS, "The keeper's log names eleven ships."]
    settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": []}
    whole = engine.generate("Who?", chunks, reuse=False, **settings)
    found = engine.generate("Who?", chunks, **WAYS[0], min_sure=1.0, **settings)
    assert found.token_ids == whole.token_ids
    assert (found.report.missed > 0, found.report.storing) == (True, 1)
    assert engine.flush(60)
    assert engine.generate("Who?", chunks, **WAYS[0], **settings).report.missed == 0


def stream(engine: CacheTune, **options: Any) -> Any:
    return engine.stream(
        QUERIES[0], CHUNKS, **WAYS[0], max_new_tokens=TOKENS, eos_token_id=[], do_sample=False, **options
    )


def test_an_answer_that_is_given_up_is_not_read_again(engine: CacheTune) -> None:
    with stream(engine, min_sure=middle(engine)) as pieces:
        next(pieces)
    assert (pieces.report.read_again, engine.stats().read_again) == (None, 0)
    pieces = stream(engine, min_sure=middle(engine))
    next(pieces)
    engine.close()
    with pytest.raises(EngineClosedError):
        list(pieces)


@pytest.mark.parametrize("ended", ["closed", "cancelled"])
@pytest.mark.parametrize("waiting", [False, True])
def test_a_request_that_is_ended_meanwhile_reads_nothing_again(
    engine: CacheTune, monkeypatch: pytest.MonkeyPatch, ended: str, waiting: bool
) -> None:
    """Before it reads again, or while it waits for the model."""
    least, executor, lock = middle(engine), engine.runtime.executor, engine.runtime.model.lock
    read, read_again, reserved = [], executor.read_again, lock.reserved

    def now() -> None:
        if ended == "closed":
            engine.close()
        else:
            monkeypatch.setattr(executor_module, "check_cancelled", cancelled)

    def while_waiting() -> Any:
        now()
        return reserved()

    def end(*arguments: Any) -> Any:
        if waiting:
            monkeypatch.setattr(lock, "reserved", while_waiting)
        else:
            now()
        return read_again(*arguments)

    def cancelled() -> None:
        raise asyncio.CancelledError

    monkeypatch.setattr(executor, "read_again", end)
    monkeypatch.setattr(engine.runtime.assembler, "full_prefill", read.append)
    with pytest.raises(EngineClosedError if ended == "closed" else asyncio.CancelledError):
        list(stream(engine, min_sure=least))
    assert read == []


@pytest.mark.parametrize("last", [False, True])
def test_weights_that_change_meanwhile_end_the_answer(
    engine: CacheTune, monkeypatch: pytest.MonkeyPatch, last: bool
) -> None:
    """Also where the token that is chosen behind full prefill is the answer's last one."""
    least, assembler = middle(engine), engine.runtime.assembler
    full_prefill, again = assembler.full_prefill, answer(engine, **WAYS[0], min_sure=least).report.read_again
    assert again is not None
    assert again.token > 0

    def change(*arguments: Any) -> PrefillState:
        state = full_prefill(*arguments)
        with torch.no_grad():
            next(engine.adapter.model.parameters()).add_(1)
        return state

    monkeypatch.setattr(assembler, "full_prefill", change)
    with pytest.raises(ModelChangedError):
        answer(engine, **WAYS[0], min_sure=least, max_new_tokens=again.token + 1 if last else TOKENS)


def test_reading_again_needs_no_store() -> None:
    store = ChunkStore(None)
    with CacheTune(llama(), tokenizer(), store) as engine:
        engine.precompute([Document("a", CHUNKS)])
        whole, least = answer(engine, **WAYS[0]), middle(engine)
        expected = answer(engine, **WAYS[0], min_sure=least)
        pieces = stream(engine, min_sure=least)
        text = next(pieces)
        store.close()
        text += "".join(pieces)
        assert (text, pieces.answer.token_ids) == (expected.text, expected.token_ids)
        assert pieces.report.read_again is not None
        assert whole.report.read_again is None


def test_several_at_once_are_each_full_prefills(engine: CacheTune) -> None:
    whole = [answer(engine, query, reuse=False).token_ids for query in QUERIES]
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda query: answer(engine, query, **WAYS[1], min_sure=1.0).token_ids, QUERIES * 4)
        assert list(found) == whole * 4
    many = engine.generate_many(
        [{"query": query, "chunks": CHUNKS} for query in QUERIES],
        min_sure=1.0, max_new_tokens=TOKENS, eos_token_id=[], do_sample=False,
    )  # fmt: skip
    assert [each.token_ids for each in many] == whole


def test_the_first_reading_is_gone_before_the_second_one_takes_memory(
    engine: CacheTune, monkeypatch: pytest.MonkeyPatch
) -> None:
    assembler, caches, there = engine.runtime.assembler, [], []
    prefill, full_prefill = assembler.prefill, assembler.full_prefill

    def watched(*arguments: Any, **options: Any) -> PrefillState:
        state = prefill(*arguments, **options)
        caches.append(weakref.ref(state.cache))
        return state

    def second(*arguments: Any) -> PrefillState:
        there.append(caches[-1]() is not None)
        return full_prefill(*arguments)

    bounds = [1.0, middle(engine)]
    monkeypatch.setattr(assembler, "prefill", watched)
    monkeypatch.setattr(assembler, "full_prefill", second)
    gc.disable()
    try:
        for least in bounds:
            answer(engine, **WAYS[0], min_sure=least)
    finally:
        gc.enable()
    assert there == [False, False]


def test_fidelity_leaves_out_what_was_read_again() -> None:
    with CacheTune(llama(), tokenizer(), fidelity_sample=1.0) as engine:
        engine.precompute([Document("a", CHUNKS)])
        answer(engine, **WAYS[0], min_sure=1.0)
        answer(engine, **WAYS[0], min_sure=0.0)
        assert engine.runtime.fidelity.wait(60)
        found = engine.stats().fidelity
        assert found is not None
        assert (found.samples, found.errors) == (1, 0)
