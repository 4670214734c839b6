"""OpenTelemetry spans of an engine's requests, through opentelemetry-api (extra `opentelemetry`).

    from cachetune_rag.telemetry.tracing import trace_requests
    trace_requests(engine)

A span `cachetune.prefill` for every prompt read and `cachetune.answer` for every finished answer, as children of the
span that is current in the thread that asks. Attributes are counts, times and names of settings; never a text.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from cachetune_rag.report import Report

try:
    from opentelemetry import trace
except ImportError as error:
    raise ImportError("spans need opentelemetry-api: pip install 'cachetune-rag[opentelemetry]'.") from error

if TYPE_CHECKING:
    from cachetune_rag.answering.answer import Answer
    from cachetune_rag.telemetry.observer import Observed

_COUNTS = (
    "prompt_tokens",
    "reused",
    "recomputed",
    "missed",
    "skipped",
    "probed",
    "prefix_kept",
    "recognised",
    "retrieved",
)
_FAULTS = ("damaged", "unreadable", "timed_out")
_FIELDS = (*_COUNTS, *_FAULTS, "ratio", "selector", "full", "found_share")


def trace_requests(engine: Observed, tracer_provider: Any = None) -> SpanObserver:
    """Make spans of an engine's requests from now on; pass the returned observer to `engine.observers.remove` to stop.

    Args:
        engine: the engine.
        tracer_provider: an OpenTelemetry TracerProvider; default: the global one.
    """
    observer = SpanObserver(trace.get_tracer("cachetune_rag", tracer_provider=tracer_provider))
    engine.observers.add(observer)
    return observer


class SpanObserver:
    """Makes a span of every finished request, with its times."""

    def __init__(self, tracer: trace.Tracer):
        self._tracer = tracer

    def prefilled(self, report: Report) -> None:
        """See `RequestObserver`."""
        attributes: dict[str, Any] = {f"cachetune.{name}": getattr(report, name) for name in _FIELDS}
        attributes |= {f"cachetune.seconds.{phase}": seconds for phase, seconds in report.timings.items()}
        attributes |= {f"cachetune.bytes_read.{tier}": count for tier, count in report.bytes_read.items()}
        self._span("cachetune.prefill", report, report.ttft, attributes)

    def answered(self, report: Report, answer: Answer, seconds: float) -> None:
        """See `RequestObserver`."""
        attributes = {
            "cachetune.completion_tokens": len(answer.token_ids),
            "cachetune.finish_reason": answer.finish_reason,
            "cachetune.ttft": report.ttft,
        }
        if (again := report.read_again) is not None:
            read_again = {"token": again.token, "sure": again.sure, "tokens": again.tokens, "seconds": again.seconds}
            attributes |= {f"cachetune.read_again.{name}": value for name, value in read_again.items()}
        self._span("cachetune.answer", report, seconds, attributes)

    def _span(self, name: str, report: Report, seconds: float, attributes: dict[str, Any]) -> None:
        end = time.time_ns()
        span = self._tracer.start_span(
            name,
            start_time=end - int(seconds * 1e9),
            attributes={"cachetune.request_id": report.request_id, **attributes},
        )
        span.end(end)
