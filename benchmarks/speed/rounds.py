"""Timing several ways of reading one prompt in turn, round by round."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from common import spread

WARM = 2
"""Rounds that don't count: the first runs a size as it is, the second captures its CUDA graph."""


@dataclass
class Samples:
    """What was measured of one way.

    Attributes:
        seconds: to the first token's logits, by round.
        timings: where they went, by phase, of every round.
        peak: most bytes of device memory while it ran.
        last: what the last request returned besides its seconds.
    """

    seconds: list[float] = field(default_factory=list)
    timings: dict[str, list[float]] = field(default_factory=dict)
    peak: int = 0
    last: Any = None

    def median(self) -> float:
        """Of the seconds."""
        return statistics.median(self.seconds)

    def spread(self) -> dict[str, Any]:
        """Median and samples, for JSON."""
        return spread(self.seconds)

    def split(self) -> dict[str, float]:
        """Median seconds of each phase."""
        return {name: round(statistics.median(values), 6) for name, values in self.timings.items()}


Way = Callable[[], tuple[float, Any]]
"""Reads the prompt once: seconds, and whatever else it has to say (a Report, say)."""


def rounds(
    ways: dict[Any, Way], count: int, device: str, until: float, rarely: Mapping[Any, int] | None = None
) -> Iterator[dict[Any, Samples]]:
    """Run every way in turn, WARM rounds that don't count and `count` that do; gives out what there is after each of these.

    Args:
        ways: what to time.
        count: rounds that count.
        device: "cuda" or another.
        until: time.perf_counter() after which no further round begins, once one has counted.
        rarely: ways that run in fewer rounds than that, and in none that doesn't count: so long that warming up is nothing.
    """
    found = {name: Samples() for name in ways}
    rarely = dict(rarely or {})
    for round_ in range(-WARM, count):
        if round_ > 0 and time.perf_counter() > until:
            return
        # Every other round backwards: behind a long computation a card is hot and slower.
        for name, way in ways.items() if round_ % 2 == 0 else reversed(ways.items()):
            most = rarely.get(name)
            if most is not None and not 0 <= round_ < most:
                continue
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            seconds, last = way()
            if round_ < 0:
                continue
            samples = found[name]
            samples.seconds.append(seconds)
            samples.last = last
            for phase, took in getattr(last, "timings", {}).items():
                samples.timings.setdefault(phase, []).append(took)
            if device == "cuda":
                samples.peak = max(samples.peak, torch.cuda.max_memory_allocated())
        if round_ >= 0:
            yield found
