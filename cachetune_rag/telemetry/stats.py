"""Totals over an engine's requests, and its store's statistics."""

from __future__ import annotations

import dataclasses
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from cachetune_rag.answering.request import Request, RequestListener
from cachetune_rag.concurrency.deadline import DeadlinePool, StoreTimeoutError
from cachetune_rag.concurrency.workers import Job
from cachetune_rag.measuring.fidelity import FidelityStats
from cachetune_rag.report import ReadAgain, Report, share_found
from cachetune_store import ChunkStore, StoreError, StoreStats
from cachetune_store.histogram import Histogram

_SUMMED = ("prompt_tokens", "reused", "recomputed", "missed", "damaged", "unreadable", "timed_out", "retrieved")
"""Fields of `Report` that are added up."""
WAIT = 5.0
"""Seconds to wait for the store's statistics: half of Prometheus' default limit for all metrics together."""


@dataclass(frozen=True)
class EngineStats:
    """Totals since the engine was made, and the store's present state.

    Attributes:
        requests: prompts read with reuse.
        full_prefills: prompts read without reuse.
        prompt_tokens, reused, recomputed, missed: tokens, summed over the prompts read with reuse; see `Report`.
        damaged, unreadable, timed_out: chunks that were in the store and had to be computed, summed; see `Report`.
        retrieved: tokens of texts that callers said they had retrieved, summed; see `Report`.
        retrieved_found: how many of these were found in the store.
        ttft_seconds: time to first token, summed.
        ttft: count, mean, p50, p95 and p99 of the time to first token, by the slowest tier that a request read from.
        unstored: chunks that requests missed and that could not be stored afterwards; the reason is in the log.
        withdrawn: chunks that requests missed and that were not stored, because their document was removed or replaced meanwhile.
        storing: chunks that requests missed and that wait to be stored now.
        little_found: prompts from text or messages in which much was retrieved and less than half of it found, or that are longer
            than 1,000 tokens and of which less than a tenth was; the likely reasons are in the log.
        cut_short: prompts that repeat the beginnings of stored chunks so often that not every place in them was looked at.
        read_again: prompts that were read again without reuse, because the model was not sure of a token (`min_sure`).
        read_again_tokens: tokens that were computed for it, summed; they are in none of the other sums.
        store: the store's own figures.
        store_age: seconds since they were read; 0.0 unless the store's disk doesn't answer.
        fidelity: how far answers were from full prefill; None unless the engine samples it (`fidelity_sample`).
    """

    requests: int
    full_prefills: int
    prompt_tokens: int
    reused: int
    recomputed: int
    missed: int
    damaged: int
    unreadable: int
    timed_out: int
    retrieved: int
    retrieved_found: int
    ttft_seconds: float
    ttft: dict[str, dict[str, float | int | None]]
    store: StoreStats
    fidelity: FidelityStats | None = None
    unstored: int = 0
    withdrawn: int = 0
    storing: int = 0
    little_found: int = 0
    cut_short: int = 0
    store_age: float = 0.0
    read_again: int = 0
    read_again_tokens: int = 0

    @property
    def found_share(self) -> float:
        """Share of the retrieved tokens that was found in the store. If no request said what was retrieved, the share of all prompts'
        tokens."""
        if self.retrieved:
            return share_found(self.retrieved_found, self.retrieved)
        return share_found(self.reused + self.recomputed, self.prompt_tokens)

    def as_dict(self) -> dict[str, Any]:
        """The fields and `found_share`, for JSON."""
        return {
            **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)},
            "found_share": self.found_share,
            "store": self.store.as_dict(),
            "fidelity": None if self.fidelity is None else dataclasses.asdict(self.fidelity),
        }


class RequestCounter(RequestListener):
    """Adds up reports. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests = self._full = 0
        self._read_again = self._read_again_tokens = 0
        self._sums = dict.fromkeys(_SUMMED, 0)
        self._retrieved_found = 0
        self._ttft = 0.0
        self._by_tier: dict[str, Histogram] = {}

    def prefilled(self, request: Request, report: Report) -> None:
        """Count one request."""
        with self._lock:
            if report.full:
                self._full += 1
                return
            self._requests += 1
            for name in _SUMMED:
                self._sums[name] += getattr(report, name)
            if report.retrieved:
                self._retrieved_found += min(report.reused + report.recomputed, report.retrieved)
            self._ttft += report.ttft
            histogram = self._by_tier.setdefault(report.slowest_tier, Histogram())
        histogram.add(report.ttft)

    def read_again(self, request: Request, again: ReadAgain) -> None:
        """Count one prompt that was read again."""
        with self._lock:
            self._read_again += 1
            self._read_again_tokens += again.tokens

    def ttft_histograms(self) -> dict[str, Histogram]:
        """Times to first token, by the slowest tier read from."""
        with self._lock:
            return dict(self._by_tier)

    def stats(
        self, store: StoreStats, fidelity: FidelityStats | None, *, store_age: float, **counts: int
    ) -> EngineStats:
        """The totals, together with the counts of other parts of the engine (`counts`, by field); see `EngineStats`."""
        with self._lock:
            return EngineStats(
                requests=self._requests,
                full_prefills=self._full,
                **self._sums,
                retrieved_found=self._retrieved_found,
                ttft_seconds=self._ttft,
                ttft={tier: histogram.summary() for tier, histogram in self._by_tier.items()},
                store=store,
                fidelity=fidelity,
                read_again=self._read_again,
                read_again_tokens=self._read_again_tokens,
                **counts,
                store_age=store_age,
            )


class LastKnownStoreStats:
    """The store's statistics, which are read from its index on disk. While the disk doesn't answer, the last known ones.

    Reading statistics must not change how requests are served. So a reading that takes long is left behind without counting as overdue,
    because that would make requests avoid the disk. Until it has ended, no other is started.

    Args:
        store: the store.
        pool: makes the calls.
    """

    def __init__(self, store: ChunkStore, pool: DeadlinePool):
        self._store, self._pool = store, pool
        self._last: tuple[StoreStats, float] | None = None
        self._pending: Job[StoreStats] | None = None
        with suppress(StoreError):
            self.get()  # so that there are last known ones

    @property
    def pending(self) -> Job[StoreStats] | None:
        """The last reading that took too long and was left behind; None if there was none."""
        return self._pending

    def get(self) -> tuple[StoreStats, float]:
        """The statistics, and how many seconds old they are: 0.0 if they were read now.

        Raises:
            StoreTimeoutError: the disk hasn't answered since this object was made.
            StoreError: the index can't be read.
        """
        seconds = self._pool.seconds
        if seconds is None:
            return self._store.stats(), 0.0
        if not self._pool.overdue and (self._pending is None or self._pending.done()):
            reading = self._pool.start_apart(self._store.stats)
            try:
                stats = reading.result(min(seconds, WAIT))
            except TimeoutError:
                if reading.done():
                    raise  # the store itself raised it
                self._pending = reading
            else:
                self._last = stats, time.monotonic()
                return stats, 0.0
        if self._last is None:
            raise StoreTimeoutError("the store's disk doesn't answer, and what it holds was never known")
        stats, since = self._last
        return stats, time.monotonic() - since
