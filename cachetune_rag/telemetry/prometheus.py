"""Prometheus metrics of an engine, through prometheus_client (extra `prometheus`).

    from cachetune_rag.telemetry.prometheus import CacheTuneCollector
    prometheus_client.REGISTRY.register(CacheTuneCollector(engine))

Numbers are read when Prometheus asks for them, so requests are not slowed down.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

try:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
    from prometheus_client.registry import Collector
except ImportError as error:
    raise ImportError("Prometheus metrics need prometheus_client: pip install 'cachetune-rag[prometheus]'.") from error

if TYPE_CHECKING:
    from cachetune_rag.measuring.fidelity import FidelityStats
    from cachetune_rag.telemetry.observer import HasStats
    from cachetune_store.histogram import Histogram

_TOKENS = ("prompt_tokens", "reused", "recomputed", "missed", "retrieved", "retrieved_found")
_FAULTS = {
    "damaged": "Chunks found damaged and set aside",
    "unreadable": "Chunks that the system refused to read",
    "timed_out": "Chunks that the disk didn't give in time",
}
_TIER_COUNTERS = {
    "hits": "Chunks found",
    "misses": "Chunks looked for in vain",
    "evictions": "Chunks that had to make room",
    "damaged": "Chunks found damaged and set aside",
    "promotions": "Chunks that came up from the tier below",
    "demotions": "Chunks that came down from the tier above",
    "bytes_read": "Bytes read",
    "bytes_written": "Bytes written",
    "failed": "Requests that a remote tier did not answer, or not in time, or with an error",
}


class CacheTuneCollector(Collector):
    """Metrics of one engine, all named `cachetune_...`, with the tenant's and the model's name left out.

    Args:
        engine: the engine. Register the collector with a registry of prometheus_client.
        labels: further labels for all metrics, where one process has several engines.
    """

    def __init__(self, engine: HasStats, labels: dict[str, str] | None = None):
        self._engine, self._labels = engine, dict(labels or {})

    def describe(self) -> list[Any]:
        """Describe nothing in advance: registering must not ask the engine."""
        return []

    def collect(self) -> Iterator[Any]:
        """All metrics as they are now."""
        stats = self._engine.stats()
        yield self._counter("requests", "Prompts read with reuse", stats.requests)
        yield self._counter("full_prefills", "Prompts read without reuse", stats.full_prefills)
        yield self._counter(
            "prompts_read_again", "Prompts read again without reuse in the middle of an answer", stats.read_again
        )
        yield self._counter(
            "tokens_read_again", "Tokens computed to read prompts again without reuse", stats.read_again_tokens
        )
        for name, text in _FAULTS.items():
            yield self._counter(f"request_{name}_chunks", f"{text} while answering", getattr(stats, name))
        yield self._counter(
            "unstored_chunks", "Chunks that requests missed and that could not be stored", stats.unstored
        )
        yield self._counter(
            "withdrawn_chunks",
            "Chunks that requests missed and that were not stored, as their document was removed meanwhile",
            stats.withdrawn,
        )
        yield self._counter(
            "little_found_prompts", "Prompts in which little was found of much that was retrieved", stats.little_found
        )
        yield self._counter(
            "cut_short_prompts", "Prompts in which not every place was looked at for stored chunks", stats.cut_short
        )
        yield self._gauge("storing_chunks", "Chunks that requests missed and that wait to be stored", stats.storing)
        tokens = CounterMetricFamily(
            "cachetune_tokens",
            "Tokens of prompts, by what became of them, and of retrieved texts",
            labels=self._names("kind"),
        )
        for kind in _TOKENS:
            tokens.add_metric(self._values(kind), getattr(stats, kind))
        yield tokens
        ttft = HistogramMetricFamily(
            "cachetune_ttft_seconds",
            "Time to first token, by the slowest tier that was read",
            labels=self._names("tier"),
        )
        for tier, histogram in self._engine.ttft_histograms().items():
            self._add(ttft, tier, histogram)
        yield ttft
        yield self._gauge(
            "store_age_seconds", "Age of the store's figures: above 0 while its disk doesn't answer", stats.store_age
        )
        yield self._gauge("documents", "Documents of all tenants", stats.store.documents)
        for name, text in (
            ("chunks", "Chunks held"),
            ("bytes", "Bytes held"),
            ("budget", "Most bytes"),
            ("pinned", "Chunks in use"),
        ):
            family = GaugeMetricFamily(f"cachetune_tier_{name}", text, labels=self._names("tier"))
            for held in stats.store.tiers:
                family.add_metric(self._values(held.name), getattr(held, name))
            yield family
        for name, text in _TIER_COUNTERS.items():
            counter = CounterMetricFamily(f"cachetune_tier_{name}", text, labels=self._names("tier"))
            for held in stats.store.tiers:
                counter.add_metric(self._values(held.name), getattr(held, name))
            yield counter
        if stats.fidelity is not None:
            yield from self._fidelity(stats.fidelity)

    def _fidelity(self, found: FidelityStats) -> Iterator[Any]:
        yield self._counter("fidelity_samples", "Answers compared with full prefill", found.samples)
        yield self._counter("fidelity_dropped", "Answers chosen for it, but not compared", found.dropped)
        yield self._counter("fidelity_errors", "Comparisons that failed", found.errors)
        if found.kl is not None and found.top1 is not None:
            family = GaugeMetricFamily(
                "cachetune_fidelity_kl", "KL(full || reuse) of an answer, nats a token", labels=self._names("statistic")
            )
            for name in ("mean", "max", "p50", "p95"):
                family.add_metric(self._values(name), getattr(found.kl, name))
            yield family
            yield self._gauge(
                "fidelity_top1", "Share of answer tokens that full prefill finds likeliest too", found.top1
            )

    def _names(self, *own: str) -> list[str]:
        return [*own, *self._labels]

    def _values(self, *own: str) -> list[str]:
        return [*own, *self._labels.values()]

    def _counter(self, name: str, text: str, value: float) -> Any:
        family = CounterMetricFamily(f"cachetune_{name}", text, labels=self._names())
        family.add_metric(self._values(), value)
        return family

    def _gauge(self, name: str, text: str, value: float) -> Any:
        family = GaugeMetricFamily(f"cachetune_{name}", text, labels=self._names())
        family.add_metric(self._values(), value)
        return family

    def _add(self, family: Any, label: str, histogram: Histogram) -> None:
        buckets = [(repr(bound), count) for bound, count in histogram.cumulative()]
        family.add_metric(self._values(label), [*buckets, ("+Inf", histogram.count)], histogram.sum)
