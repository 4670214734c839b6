"""Observers, which users register to be told about requests, and the log line of each request."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from cachetune_rag.answering.answer import Answer
from cachetune_rag.answering.request import Finished, Request, RequestListener
from cachetune_rag.report import Report

if TYPE_CHECKING:
    from cachetune_rag.telemetry.stats import EngineStats
    from cachetune_store.histogram import Histogram

_log = logging.getLogger("cachetune_rag.requests")


class RequestObserver(Protocol):
    """Is told about requests, on the thread that makes them, so it should be quick. What it raises is logged and dropped."""

    def prefilled(self, report: Report) -> None:
        """A prompt was read."""

    def answered(self, report: Report, answer: Answer, seconds: float) -> None:
        """An answer is finished, `seconds` after its request came."""


class HasStats(Protocol):
    """An engine whose totals can be read."""

    def stats(self) -> EngineStats:
        """Totals over its requests, and its store's state."""

    def ttft_histograms(self) -> Mapping[str, Histogram]:
        """Times to first token, by the slowest tier that was read from."""


class Observed(Protocol):
    """An engine that observers can be added to."""

    @property
    def observers(self) -> Observers:
        """Its observers."""


class Observers:
    """An engine's observers. It also logs each request by its id, with counts and times only."""

    def __init__(self) -> None:
        self._all: tuple[RequestObserver, ...] = ()

    def add(self, observer: RequestObserver) -> None:
        """Notify `observer` from now on."""
        self._all = (*self._all, observer)

    def remove(self, observer: RequestObserver) -> None:
        """Stop notifying it; unknown observers are ignored."""
        self._all = tuple(o for o in self._all if o is not observer)

    def prefilled(self, report: Report) -> None:
        """Notify all observers that a prompt was read."""
        _log.debug("request %s: %s", report.request_id, report, extra={"request_id": report.request_id})
        if told := ", ".join(f"{count} {what}" for what, count in _faults(report).items() if count):
            _log.warning(
                "request %s: chunks were computed instead of read: %s",
                report.request_id,
                told,
                extra={"request_id": report.request_id},
            )
        self._tell("prefilled", report)

    def answered(self, report: Report, answer: Answer, seconds: float) -> None:
        """Notify all observers that an answer is finished."""
        _log.debug(
            "request %s: %d tokens answered in %.3f s (%s)",
            report.request_id,
            len(answer.token_ids),
            seconds,
            answer.finish_reason,
            extra={"request_id": report.request_id},
        )
        self._tell("answered", report, answer, seconds)

    def _tell(self, event: str, *arguments: Any) -> None:
        for observer in self._all:
            try:
                getattr(observer, event)(*arguments)
            except Exception:
                _log.exception("an observer failed at %r; the request is not affected", event)


def _faults(report: Report) -> dict[str, int]:
    return {
        "damaged and set aside": report.damaged,
        "unreadable": report.unreadable,
        "not read in time": report.timed_out,
    }


class ObserverListener(RequestListener):
    """Notifies an engine's observers."""

    def __init__(self, observers: Observers):
        self._observers = observers

    def prefilled(self, request: Request, report: Report) -> None:
        """The prompt was read."""
        self._observers.prefilled(report)

    def finished(self, end: Finished) -> Report:
        """Observers are told of complete answers only."""
        if end.answer is not None:
            self._observers.answered(end.report, end.answer, end.seconds)
        return end.report
