"""What is told about requests: percentiles, Prometheus, spans, logs; and that none of it holds a text."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from faulty_disk import Fault, faulty_disk
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry
from tiny import llama, tokenizer

from cachetune_rag import CacheTune
from cachetune_rag.telemetry.prometheus import CacheTuneCollector
from cachetune_rag.telemetry.tracing import trace_requests
from cachetune_store.histogram import Histogram

CHUNKS = ["The keeper lit the lamp at dusk.", "The harbour master wrote a letter."]
SECRET = "keeper"


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[CacheTune]:
    with CacheTune(llama(), tokenizer(), tmp_path / "kv", host_budget=0) as engine:
        engine.precompute(CHUNKS)
        yield engine


def test_percentiles_are_right_to_a_tenth() -> None:
    histogram = Histogram()
    values = [random.Random(i).lognormvariate(-2, 1) for i in range(5000)]
    for value in values:
        histogram.add(value)
    ordered = sorted(values)
    for share in (0.5, 0.95, 0.99):
        assert histogram.quantile(share) == pytest.approx(ordered[int(share * 5000) - 1], rel=0.1)
    assert histogram.sum == pytest.approx(sum(values))
    assert histogram.cumulative()[-1][1] == histogram.count == 5000


def test_an_empty_histogram_has_no_percentiles() -> None:
    assert Histogram().summary() == {"count": 0, "mean": None, "p50": None, "p95": None, "p99": None}


def test_histograms_add_up_and_refuse_what_is_none() -> None:
    one, two = Histogram(), Histogram()
    one.add(0.1)
    two.add(10.0)
    one.merge(two.drain())
    assert (one.count, two.count) == (2, 0)
    for broken in (
        None,
        {"counts": {"x": 1}, "sum": 0},
        {"counts": {"5": -1}, "sum": 0},
        {"counts": {"9999": 1}, "sum": 0},
    ):
        with pytest.raises(ValueError, match=r"histogram|buckets|invalid"):
            one.merge(broken)
    assert one.count == 2


def test_stats_tell_the_time_to_first_token_by_tier(engine: CacheTune) -> None:
    for _ in range(3):
        engine.generate("Who?", CHUNKS, max_new_tokens=2)
    told = engine.stats().as_dict()["ttft"]
    assert set(told) == {"disk"}
    assert told["disk"]["count"] == 3
    assert 0 < told["disk"]["p50"] <= told["disk"]["p99"]


def test_prometheus_shows_the_engines_numbers(engine: CacheTune) -> None:
    registry = CollectorRegistry()
    registry.register(CacheTuneCollector(engine, {"pool": "a"}))
    engine.generate("Who?", CHUNKS, max_new_tokens=2)
    stats = engine.stats()
    read = registry.get_sample_value
    assert read("cachetune_requests_total", {"pool": "a"}) == 1
    assert read("cachetune_tokens_total", {"kind": "reused", "pool": "a"}) == stats.reused > 0
    assert read("cachetune_tier_hits_total", {"tier": "disk", "pool": "a"}) == 2
    assert read("cachetune_ttft_seconds_count", {"tier": "disk", "pool": "a"}) == 1
    assert read("cachetune_ttft_seconds_bucket", {"tier": "disk", "pool": "a", "le": "+Inf"}) == 1


def test_chunks_that_could_not_be_read_are_counted_and_told(
    tmp_path: Path, engine: CacheTune, caplog: pytest.LogCaptureFixture
) -> None:
    registry = CollectorRegistry()
    registry.register(CacheTuneCollector(engine))
    with faulty_disk(tmp_path / "kv" / "chunks", Fault("EACCES", ("open",))):
        report = engine.generate("Who?", CHUNKS, max_new_tokens=1).report
    stats = engine.stats()
    assert (stats.damaged, stats.unreadable, stats.timed_out) == (0, report.unreadable, 0)
    assert registry.get_sample_value("cachetune_request_unreadable_chunks_total") == report.unreadable > 0
    assert f"request {report.request_id}: chunks were computed instead of read: 2 unreadable" in caplog.text


def test_spans_lie_under_the_callers_and_hold_no_text(engine: CacheTune) -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    observer = trace_requests(engine, provider)
    with provider.get_tracer("test").start_as_current_span("caller") as caller:
        answer = engine.generate("Who?", CHUNKS, max_new_tokens=2)
    spans = {span.name: span for span in exporter.get_finished_spans()}
    assert {"cachetune.prefill", "cachetune.answer", "caller"} == set(spans)
    prefill = spans["cachetune.prefill"]
    assert prefill.parent is not None
    assert prefill.parent.span_id == caller.get_span_context().span_id
    assert prefill.attributes is not None
    assert prefill.attributes["cachetune.reused"] == answer.report.reused
    assert prefill.attributes["cachetune.request_id"] == answer.report.request_id
    assert SECRET not in str([span.to_json() for span in spans.values()])
    engine.observers.remove(observer)
    engine.generate("Who?", CHUNKS, max_new_tokens=1)
    assert len(exporter.get_finished_spans()) == 3


def test_logs_name_the_request_and_hold_no_text(engine: CacheTune, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "cachetune_rag"), caplog.at_level(logging.DEBUG, "cachetune_store"):
        answer = engine.generate("Who is the keeper?", [*CHUNKS, "A keeper of bees."], max_new_tokens=2)
    assert answer.report.missed > 0
    assert answer.report.request_id in caplog.text
    assert all(
        record.request_id == answer.report.request_id for record in caplog.records if record.name.endswith("requests")
    )  # type: ignore[attr-defined]
    assert SECRET not in caplog.text


def test_an_observer_that_fails_costs_no_request(engine: CacheTune, caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        def prefilled(self, report: object) -> None:
            raise RuntimeError("no")

    engine.observers.add(Broken())  # type: ignore[arg-type]
    assert engine.generate("Who?", CHUNKS, max_new_tokens=2).text is not None
    assert "request is not affected" in caplog.text


def test_every_request_has_an_id_of_its_own(engine: CacheTune) -> None:
    ids = {engine.prefill("Who?", CHUNKS).report.request_id for _ in range(4)}
    assert len(ids) == 4
    assert "" not in ids
