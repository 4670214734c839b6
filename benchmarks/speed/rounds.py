"""Times several ways of reading one prompt in turn, round by round."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from common import spread

WARM = 2
"""How many rounds don't count. The first runs without a CUDA graph, the second captures it."""


@dataclass
class Samples:
    """What was measured for one way.

    Attributes:
        seconds: seconds to the first token's logits, for each round.
        timings: seconds of each phase, for each round.
        peak: the most bytes of device memory in use while it ran.
        last: what the last request returned besides its seconds.
    """

    seconds: list[float] = field(default_factory=list)
    timings: dict[str, list[float]] = field(default_factory=dict)
    peak: int = 0
    last: Any = None

    def median(self) -> float:
        """Median of `seconds`."""
        return statistics.median(self.seconds)

    def spread(self) -> dict[str, Any]:
        """Median and samples, for JSON."""
        return spread(self.seconds)

    def split(self) -> dict[str, float]:
        """Median seconds of each phase."""
        return {name: round(statistics.median(values), 6) for name, values in self.timings.items()}


Way = Callable[[], tuple[float, Any]]
"""Reads the prompt once. Gives the seconds and something else, such as a Report."""


def rounds(
    ways: dict[Any, Way], count: int, device: str, until: float, rarely: Mapping[Any, int] | None = None
) -> Iterator[dict[Any, Samples]]:
    """Run all ways in turn, in WARM rounds that don't count and then `count` rounds that do. Yields the results after each of these.

    Args:
        ways: what to time.
        count: how many rounds count.
        device: "cuda" or another.
        until: a time of time.perf_counter(). No further round begins after it, once one has counted.
        rarely: ways that run in fewer rounds, and not in those that don't count. They take so long that warming up makes no difference.
    """
    found = {name: Samples() for name in ways}
    rarely = dict(rarely or {})
    for round_ in range(-WARM, count):
        if round_ > 0 and time.perf_counter() > until:
            return
        # Every second round goes backwards, because a GPU is hot and slower after a long computation.
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
