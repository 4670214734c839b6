"""What share of the retrieved tokens was found: told by prompts, reports, totals, metrics and spans."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry
from tiny import llama, tokenizer

from cachetune_rag import CacheTune, PromptError
from cachetune_rag.telemetry.prometheus import CacheTuneCollector
from cachetune_rag.telemetry.tracing import trace_requests

KEPT = "The keeper lit the lamp at dusk, as every evening."
OTHER = "Nobody ever stored the harbour master's own words."


@pytest.fixture
def engine() -> Iterator[CacheTune]:
    with CacheTune(llama(), tokenizer(), lead_in="first_token") as engine:
        engine.precompute(KEPT)
        yield engine


def test_the_report_says_what_share_of_the_retrieved_tokens_was_found(engine: CacheTune) -> None:
    prompt = engine.prompt_from_text(f"{KEPT}\n{OTHER}\nWho?", retrieved=[KEPT, OTHER])
    assert prompt.retrieved == len(KEPT) + len(OTHER)  # a token a byte
    report = engine.prefill(prompt=prompt, ratio=0.3).report
    assert report.retrieved == prompt.retrieved
    assert report.found_share == pytest.approx(len(KEPT) / (len(KEPT) + len(OTHER)))
    assert report.as_dict()["found_share"] == report.found_share
    assert "50% of 100 retrieved found" in str(report)


def test_messages_are_told_of_what_was_retrieved_too(engine: CacheTune) -> None:
    messages = [{"role": "user", "content": f"{OTHER}\nWho?"}]
    report = engine.generate(prompt=engine.prompt_from_messages(messages, retrieved=[OTHER]), max_new_tokens=1).report
    assert (report.retrieved, report.found_share) == (len(OTHER), 0.0)


def test_what_was_retrieved_changes_nothing_in_the_prompt(engine: CacheTune) -> None:
    for recognise in (True, False):
        plain = engine.prompt_from_text(f"{KEPT}\nWho?", recognise=recognise)
        told = engine.prompt_from_text(f"{KEPT}\nWho?", recognise=recognise, retrieved=[KEPT])
        assert (told.ids, told.spans, told.recognised) == (plain.ids, plain.spans, plain.recognised)
        assert (plain.retrieved, told.retrieved) == (0, len(KEPT))


def test_a_text_that_is_shown_twice_is_no_more_than_found(engine: CacheTune) -> None:
    prompt = engine.prompt_from_text(f"{KEPT}\n{KEPT}\nWho?", retrieved=[KEPT])
    assert engine.prefill(prompt=prompt).report.found_share == 1.0


def test_where_nobody_says_what_was_retrieved_it_is_the_share_of_the_prompt(engine: CacheTune) -> None:
    report = engine.prefill(prompt=engine.prompt_from_text(f"{KEPT}\nWho?")).report
    assert report.retrieved == 0
    assert report.found_share == pytest.approx(len(KEPT) / report.prompt_tokens)


def test_totals_metrics_and_spans_tell_it(engine: CacheTune) -> None:
    spans = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    trace_requests(engine, provider)
    registry = CollectorRegistry()
    registry.register(CacheTuneCollector(engine))
    for text in (KEPT, OTHER):
        engine.prefill(prompt=engine.prompt_from_text(f"{text}\nWho?", retrieved=[text]))
    engine.prefill(prompt=engine.prompt_from_text(f"{KEPT}\nWho?"))  # counts for nothing: nobody said
    stats = engine.stats()
    assert (stats.retrieved, stats.retrieved_found) == (len(KEPT) + len(OTHER), len(KEPT))
    assert stats.as_dict()["found_share"] == stats.found_share == pytest.approx(0.5)
    assert registry.get_sample_value("cachetune_tokens_total", {"kind": "retrieved"}) == stats.retrieved
    assert registry.get_sample_value("cachetune_tokens_total", {"kind": "retrieved_found"}) == stats.retrieved_found
    attributes = [span.attributes or {} for span in spans.get_finished_spans()]
    assert [each["cachetune.found_share"] for each in attributes][:2] == [1.0, 0.0]
    assert [each["cachetune.retrieved"] for each in attributes] == [len(KEPT), len(OTHER), 0]


@pytest.mark.parametrize("wrong", [KEPT, None, [7], 3])
def test_what_is_no_list_of_texts_is_refused_by_name(engine: CacheTune, wrong: Any) -> None:
    with pytest.raises(PromptError, match=r"retrieved|text is"):
        engine.prompt_from_text("Who?", retrieved=wrong)


@pytest.mark.parametrize("wrong", ["text", {"role": "user"}, {"role": "user", "content": None}])
def test_messages_that_are_none_are_refused_as_without_recognition(engine: CacheTune, wrong: Any) -> None:
    with pytest.raises(PromptError, match="messages"):
        engine.prompt_from_messages([wrong])
