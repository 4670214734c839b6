"""What the connector tells vLLM's `/metrics` and log: counted in the scheduler's process, carried by vLLM, shown by the API server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from prometheus_client import Counter, Histogram
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Buckets of the histogram of seconds."""

_TOKENS = ("reused", "recomputed", "missed")
_CHUNKS = ("damaged", "unreadable", "timed_out", "storing", "unstored", "left_on_disk")


@dataclass
class ReuseStats(KVConnectorStats):
    """Counts since vLLM last asked: `data` holds numbers by name, and the list "seconds"."""

    def reset(self) -> None:
        """Begin anew."""
        self.data: dict[str, Any] = {}

    def is_empty(self) -> bool:
        """Whether nothing was counted."""
        return not self.data

    def add(self, name: str, amount: float = 1) -> None:
        """Add to a count."""
        self.data[name] = self.data.get(name, 0) + amount

    def add_report(self, report: Mapping[str, Any]) -> None:
        """Count a request whose prompt was put together."""
        self.add("requests")
        for name in (*_TOKENS, *_CHUNKS):
            self.add(name, report.get(name, 0))
        for tier, amount in report.get("bytes_read", {}).items():
            self.add(f"bytes:{tier}", amount)
        self.data.setdefault("seconds", []).append(report.get("ttft", 0.0))

    def add_left(self, reason: str, report: Mapping[str, Any] = MappingProxyType({})) -> None:
        """Count a request that was left to vLLM, and the chunks that its report names."""
        self.add(f"left:{reason}")
        for name in ("missed", *_CHUNKS):
            if report.get(name):
                self.add(name, report[name])

    def add_storing(self, storing: Mapping[str, int]) -> None:
        """Count chunks that a request has missed: those that will be stored, and the others."""
        for name, count in storing.items():
            self.add(name, count)

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Both together."""
        for name, amount in other.data.items():
            self.data[name] = self.data[name] + amount if name in self.data else amount
        return self

    def reduce(self) -> dict[str, int | float]:
        """One line of vLLM's log."""
        said = {name: amount for name, amount in self.data.items() if name != "seconds"}
        seconds = self.data.get("seconds", [])
        if seconds:
            said["mean seconds"] = round(sum(seconds) / len(seconds), 4)
        return {f"cachetune {name}": amount for name, amount in said.items()}


class ReuseMetrics(KVConnectorPromMetrics):
    """The connector's metrics in vLLM's `/metrics`, all named `cachetune_vllm_...`."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ):
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        counter, histogram = metric_types[Counter], metric_types[Histogram]

        def count(name: str, text: str, *labels: str) -> Any:
            return counter(name=f"cachetune_vllm_{name}", documentation=text, labelnames=[*labelnames, *labels])

        self._requests = count("requests", "Requests whose prompt was put together with reused chunks.")
        self._left = count("requests_left", "Requests that were left to vLLM, by reason.", "reason")
        self._cut_short = count(
            "prompts_cut_short",
            "Prompts of which not every place was searched for chunks, because that would take too long.",
        )
        self._tokens = count("chunk_tokens", "Tokens of chunks: reused, recomputed or missed.", "kind")
        self._chunks = count(
            "chunks", "Chunks that were computed although they are or will be stored, by reason.", "kind"
        )
        self._bytes = count("read_bytes", "Bytes of stored chunks that were read, by tier.", "tier")
        self._seconds = histogram(
            name="cachetune_vllm_seconds",
            documentation="Seconds from when a worker takes a prompt to when it is put together.",
            buckets=SECONDS,
            labelnames=labelnames,
        )

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add what was counted."""
        labels = self.per_engine_labelvalues[engine_idx]
        for name, amount in transfer_stats_data.items():
            kind, _, which = name.partition(":")
            if name == "seconds":
                for seconds in amount:
                    self._seconds.labels(*labels).observe(seconds)
            elif name == "requests":
                self._requests.labels(*labels).inc(amount)
            elif name == "cut_short":
                self._cut_short.labels(*labels).inc(amount)
            elif kind == "left":
                self._left.labels(*labels, which).inc(amount)
            elif kind == "bytes":
                self._bytes.labels(*labels, which).inc(amount)
            elif name in _TOKENS:
                self._tokens.labels(*labels, name).inc(amount)
            else:
                self._chunks.labels(*labels, name).inc(amount)
