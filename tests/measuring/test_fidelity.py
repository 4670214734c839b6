"""Sampling fidelity: right figures, and never a trace of it in an answer or in front of a request."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny import llama, tokenizer

from cachetune_rag import CacheTune, ConfigError
from cachetune_rag.concurrency.model_lock import ModelLock
from cachetune_rag.measuring.divergence import kl_divergence
from cachetune_rag.measuring.fidelity import PENDING, FidelityStats

CHUNKS = [
    "The lighthouse was built in 1871 by three brothers from the next valley.",
    "Its lamp burned whale oil until 1902, when paraffin reached the island.",
    "The keeper's log for that winter names eleven ships and one balloon.",
]
QUERIES = ["How many steps are there?", "Who built it?", "What burned?", "When?"]
WAIT = 60


def fresh(share: Any, **options: Any) -> CacheTune:
    engine = CacheTune(llama(), tokenizer(), fidelity_sample=share, **options)
    engine.precompute(CHUNKS)
    return engine


@pytest.fixture
def engine() -> Iterator[CacheTune]:
    with fresh(1) as made:
        yield made


def ask(engine: CacheTune, query: str = QUERIES[0], **options: Any) -> Any:
    return engine.generate(query, CHUNKS, **{"max_new_tokens": 6, "ratio": 0.1, **options})


def measured(engine: CacheTune) -> FidelityStats:
    assert engine.runtime.fidelity.wait(WAIT)
    found = engine.stats().fidelity
    assert found is not None
    return found


# -- figures ----------------------------------------------------------------------------------------------------------


def test_answers_are_the_same_and_stats_fill(engine: CacheTune) -> None:
    with fresh(0) as plain:
        expected = [ask(plain, q).token_ids for q in QUERIES]
        sampled = [ask(plain, q, do_sample=True, seed=3).token_ids for q in QUERIES]
        assert plain.stats().fidelity is None
        assert not plain.runtime.fidelity.queue.busy
    assert [ask(engine, q).token_ids for q in QUERIES[:2]] == expected[:2]
    first = measured(engine)
    assert [ask(engine, q).token_ids for q in QUERIES[2:]] == expected[2:]
    measured(engine)
    assert [ask(engine, q, do_sample=True, seed=3).token_ids for q in QUERIES[:2]] == sampled[:2]
    found = measured(engine)
    assert (first.samples, found.samples, found.dropped, found.errors) == (2, 6, 0, 0)
    assert found.kl is not None
    assert found.first_kl is not None
    assert 0 < found.kl.p50 <= found.kl.p95 <= found.kl.max
    assert found.kl.mean > 0
    assert engine.stats().requests == 6
    assert engine.stats().full_prefills == 0


def test_figures_are_those_of_plain_prefills(engine: CacheTune) -> None:
    answer = ask(engine)
    found = measured(engine)
    prompt = engine.prompts.build(query=QUERIES[0], chunks=CHUNKS)
    full, reuse = engine.full_prefill(prompt=prompt), engine.prefill(prompt=prompt, ratio=0.1)
    kl, same = [], 0
    for state in (full, reuse):
        rows = [state.logits]
        rows += [engine.adapter.forward(torch.tensor([t]), state.cache) for t in answer.token_ids[:-1]]
        kl.append(torch.cat(rows))
    each = kl_divergence(*kl)
    same = int((kl[0].argmax(-1) == kl[1].argmax(-1)).sum())
    assert found.tokens == len(answer.token_ids) == 6
    assert found.first_kl is not None
    assert found.kl is not None
    assert found.first_kl.mean == found.first_kl.max == pytest.approx(float(each[0]), rel=1e-3)
    assert found.kl.mean == found.kl.p50 == found.kl.p95 == pytest.approx(float(each.mean()), rel=1e-3)
    assert found.top1 == pytest.approx(same / 6)


@pytest.mark.parametrize(("share", "expected"), [(0.5, 2), (0.25, 1), (0.75, 3), (1, 4)])
def test_the_share_is_kept_by_counting(share: float, expected: int) -> None:
    with fresh(share) as engine:
        for query in QUERIES:
            ask(engine, query, max_new_tokens=1)
            engine.runtime.fidelity.wait(WAIT)
        assert measured(engine).samples == expected


def test_what_reused_nothing_needs_no_sample(engine: CacheTune) -> None:
    ask(engine, ratio=1.0)
    ask(engine, reuse=False)
    engine.generate("no chunks?", max_new_tokens=2)
    engine.prefill(QUERIES[0], CHUNKS)
    found = measured(engine)
    assert (found.samples, found.kl, found.first_kl, found.top1) == (0, None, None, None)


def test_stats_are_json(engine: CacheTune) -> None:
    assert json.loads(json.dumps(engine.stats().as_dict()))["fidelity"]["kl"] is None
    ask(engine)
    measured(engine)
    found = json.loads(json.dumps(engine.stats().as_dict()))["fidelity"]
    assert found["samples"] == 1
    assert set(found["kl"]) == set(found["first_kl"]) == {"mean", "max", "p50", "p95"}


def test_prometheus_shows_it(engine: CacheTune) -> None:
    pytest.importorskip("prometheus_client")
    from prometheus_client import CollectorRegistry

    from cachetune_rag.telemetry.prometheus import CacheTuneCollector

    registry = CollectorRegistry()
    registry.register(CacheTuneCollector(engine))
    assert registry.get_sample_value("cachetune_fidelity_samples_total") == 0
    assert registry.get_sample_value("cachetune_fidelity_top1") is None
    ask(engine)
    found = measured(engine)
    assert found.kl is not None
    assert registry.get_sample_value("cachetune_fidelity_samples_total") == 1
    assert registry.get_sample_value("cachetune_fidelity_kl", {"statistic": "p95"}) == found.kl.p95
    assert registry.get_sample_value("cachetune_fidelity_top1") == found.top1


def test_the_log_line_has_figures_and_no_text(engine: CacheTune, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "cachetune_rag"):
        answer = ask(engine, ratio=0.25)
        measured(engine)
    (line,) = [r.getMessage() for r in caplog.records if r.name == "cachetune_rag.fidelity"]
    assert answer.report.request_id in line
    assert "r=0.25" in line
    assert "over 6 answer tokens" in line
    for text in (*CHUNKS, QUERIES[0], answer.text):
        assert text not in line


# -- never in the way -------------------------------------------------------------------------------------------------


def test_nothing_is_compared_while_an_answer_is_being_read(engine: CacheTune) -> None:
    with engine.stream(QUERIES[1], CHUNKS, max_new_tokens=40) as open_stream:
        next(iter(open_stream))
        for query in (QUERIES * 2)[: PENDING + 3]:
            ask(engine, query)
        assert not engine.runtime.fidelity.wait(0.2)
        busy = engine.stats().fidelity
        assert busy is not None
        assert (busy.samples, busy.dropped) == (0, 3)
    # The stream was given up, so it isn't sampled itself.
    found = measured(engine)
    assert (found.samples, found.dropped) == (PENDING, 3)


def test_a_comparison_gives_way_to_a_request_and_begins_anew(
    engine: CacheTune, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts, answered = [], threading.Event()
    real, layers = engine.adapter.full_forward, []
    engine.adapter.attentions[-1].register_forward_hook(lambda *_: layers.append(threading.current_thread().name))

    def full_forward(ids: torch.Tensor) -> Any:
        if threading.current_thread().name == "cachetune-fidelity":
            attempts.append(len(layers))
            if len(attempts) == 1:
                request = threading.Thread(target=lambda: (ask(engine, QUERIES[1]), answered.set()), name="request")
                request.start()
                while not engine.runtime.model.lock.wanted:
                    pass
        return real(ids)

    monkeypatch.setattr(engine.adapter, "full_forward", full_forward)
    ask(engine)
    found = measured(engine)
    assert answered.is_set()
    # The last layer ran for the request between the two attempts, and not for the first of them.
    assert set(layers[attempts[0] : attempts[1]]) == {"request"}
    assert (found.samples, found.errors) == (2, 0)


def test_an_error_is_counted_and_logged_and_reaches_no_request(
    engine: CacheTune, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = ask(engine).token_ids
    measured(engine)
    with monkeypatch.context() as patch:
        patch.setattr(engine.adapter, "full_forward", lambda ids: 1 / 0)
        with caplog.at_level(logging.WARNING):
            assert ask(engine).token_ids == expected
            found = measured(engine)
    assert (found.samples, found.errors, found.dropped) == (1, 1, 0)
    assert "ZeroDivisionError" in caplog.text
    ask(engine)
    assert measured(engine).samples == 2


def test_close_drops_what_waits() -> None:
    engine = fresh(1)
    with engine.runtime.model.lock.reserved():
        ask(engine)
        engine.close()
    found = engine.runtime.fidelity.stats()
    assert found is not None
    assert (found.samples, found.dropped) == (0, 1)
    assert not engine.runtime.fidelity.queue.busy


def test_no_thread_stays_and_no_hook_either(engine: CacheTune) -> None:
    ask(engine)
    measured(engine)
    assert not [t for t in threading.enumerate() if t.name == "cachetune-fidelity"]
    assert not any(a._forward_pre_hooks for a in engine.adapter.attentions)


@pytest.mark.parametrize("share", [-0.1, 1.5, "0.1", True, None, float("nan")])
def test_a_share_out_of_range_is_refused(share: Any) -> None:
    with pytest.raises(ConfigError, match="fidelity_sample is"):
        CacheTune(llama(), tokenizer(), fidelity_sample=share)


# -- the lock ---------------------------------------------------------------------------------------------------------


def test_background_work_gets_the_lock_only_where_no_request_is() -> None:
    lock = ModelLock()
    with lock.background() as held:
        assert held
        assert not lock.wanted
    with lock.reserved(), lock, lock:
        assert lock.wanted
        in_background: list[bool] = []

        def attempt() -> None:
            with lock.background() as held:
                in_background.append(held)

        thread = threading.Thread(target=attempt)
        thread.start()
        thread.join()
        assert in_background == [False]
    with lock.reserved(), lock.background() as held:
        assert not held
    assert not lock.wanted


def test_waiting_for_idle_ends_when_told_to() -> None:
    lock, stop = ModelLock(), threading.Event()
    assert lock.wait_idle(0, stop.is_set)
    with lock.reserved():
        found: list[bool] = []
        thread = threading.Thread(target=lambda: found.append(lock.wait_idle(0, stop.is_set)))
        thread.start()
        stop.set()
        lock.wake()
        thread.join(WAIT)
        assert found == [False]


def test_a_sample_that_is_dropped_while_it_is_compared_is_counted_once_and_later_ones_are_compared(
    engine: CacheTune, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dropped_meanwhile(*logits: Any) -> Any:
        monkeypatch.undo()
        engine.runtime.fidelity.drop()  # as after a change of the weights
        return kl_divergence(*logits)

    monkeypatch.setattr("cachetune_rag.measuring.fidelity.kl_divergence", dropped_meanwhile)
    ask(engine)
    first = measured(engine)
    ask(engine, QUERIES[1])
    second = measured(engine)

    assert (first.samples, first.dropped, first.errors) == (0, 1, 0)
    assert (second.samples, second.dropped, second.errors) == (1, 1, 0)
