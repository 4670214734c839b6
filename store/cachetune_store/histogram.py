"""Durations, counted in buckets that grow by a fixed factor: bounded memory, and two histograms add up to one."""

from __future__ import annotations

import math
import threading
from typing import Any

from .printing import shown

__all__ = ["Histogram"]

_FIRST = 1e-6
_PER_DOUBLING = 4
_LAST = 40 * _PER_DOUBLING  # about 12 days


class Histogram:
    """Durations in seconds. Quantiles are right to about a tenth: the buckets are 19% wide. Threads may share one."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self._sum = 0.0
        self._lock = threading.Lock()

    def add(self, seconds: float) -> None:
        """Count one duration."""
        number = 0 if seconds <= _FIRST else math.ceil(math.log2(seconds / _FIRST) * _PER_DOUBLING)
        number = min(number, _LAST)
        with self._lock:
            self._counts[number] = self._counts.get(number, 0) + 1
            self._sum += seconds

    @property
    def count(self) -> int:
        """Durations counted."""
        with self._lock:
            return sum(self._counts.values())

    @property
    def sum(self) -> float:
        """Their sum, in seconds."""
        return self._sum

    def quantile(self, share: float) -> float | None:
        """The duration that a `share` of all (in (0, 1]) don't exceed: the middle of its bucket; None without any."""
        with self._lock:
            counts = sorted(self._counts.items())
        wanted = share * sum(count for _, count in counts)
        seen = 0
        for number, count in counts:
            seen += count
            if seen >= wanted:
                return float(_FIRST * 2 ** ((number - 0.5) / _PER_DOUBLING)) if number else _FIRST
        return None

    def cumulative(self) -> list[tuple[float, int]]:
        """Bounds in seconds, each twice the last (about 1 ms to 67 s), with how many durations lie at or below each."""
        with self._lock:
            counts = dict(self._counts)
        return [
            (_FIRST * 2**doubling, sum(c for number, c in counts.items() if number <= doubling * _PER_DOUBLING))
            for doubling in range(10, 27)
        ]

    def summary(self) -> dict[str, float | int | None]:
        """Count, mean and percentiles (seconds; None without any), as a reader wants them."""
        count = self.count
        return {
            "count": count,
            "mean": self._sum / count if count else None,
            "p50": self.quantile(0.5),
            "p95": self.quantile(0.95),
            "p99": self.quantile(0.99),
        }

    def drain(self) -> dict[str, Any]:
        """What was counted, for JSON, and begin at zero again."""
        with self._lock:
            counts, self._counts = self._counts, {}
            total, self._sum = self._sum, 0.0
        return {"counts": {str(number): count for number, count in sorted(counts.items())}, "sum": total}

    def merge(self, record: Any) -> None:
        """Add what another one counted, as `drain` gave it.

        Raises:
            ValueError: it is no such record; nothing was added.
        """
        try:
            counts = {int(number): int(count) for number, count in record["counts"].items()}
            total = float(record["sum"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{shown(record)} is no histogram") from error
        if not all(0 <= number <= _LAST and count >= 0 for number, count in counts.items()):
            raise ValueError(f"{shown(record)} has buckets or counts that no histogram has")
        with self._lock:
            for number, count in counts.items():
                self._counts[number] = self._counts.get(number, 0) + count
            self._sum += total
