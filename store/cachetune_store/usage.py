"""What a store's tiers did in all processes so far: counters and read times, which are kept in the index.

A process counts in memory. It adds its counts to the index now and then, and when it closes the store. If it is killed, its last counts
are lost; if the index is lost, all are. The counts are only for those who watch the store.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from .histogram import Histogram
from .index import Index
from .stats import Counters, TierUsage

__all__ = ["UsageLog"]


class UsageLog:
    """Counters of one tier, and `reads`, the seconds that reading a chunk took."""

    def __init__(self, index: Index, tier: str, counters: Counters) -> None:
        self._index, self._name, self._counters = index, f"usage/{tier}", counters
        self._told = Counters()
        self.reads = Histogram()
        self._new_reads = Histogram()

    def add_read(self, seconds: float) -> None:
        """Count one chunk that was read."""
        self.reads.add(seconds)
        self._new_reads.add(seconds)

    def flush(self) -> None:
        """Add the counts since the last call to the index."""
        now = Counters(**asdict(self._counters))
        new = {name: count - getattr(self._told, name) for name, count in asdict(now).items()}
        if not any(new.values()) and not self._new_reads.count:
            return
        with self._index.transaction():
            counts, reads = _parse(self._index.get(self._name))
            total = {name: counts.get(name, 0) + count for name, count in new.items()}
            reads.merge(self._new_reads.drain())
            self._index.set(self._name, {"counters": total, "reads": reads.drain()})
        self._told = now

    def lifetime(self) -> TierUsage:
        """The counts of all processes, including those of this one that are not in the index yet."""
        counts, reads = _parse(self._index.get(self._name))
        now, told = asdict(self._counters), asdict(self._told)
        total = Counters(**{name: counts.get(name, 0) + now[name] - told[name] for name in now})
        new = self._new_reads.drain()
        self._new_reads.merge(new)
        reads.merge(new)
        return TierUsage(**asdict(total), read_seconds=reads.summary())


def _parse(record: Any) -> tuple[dict[str, int], Histogram]:
    """Counters and read times of a record; empty if it can't be read."""
    reads = Histogram()
    try:
        counts = {str(name): int(count) for name, count in record["counters"].items()}
        reads.merge(record["reads"])
    except (ValueError, TypeError, KeyError, AttributeError):
        return {}, Histogram()
    return counts, reads
