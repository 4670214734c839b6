"""The search for one tier's best setting."""

from __future__ import annotations

import statistics
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from cachetune_rag.measuring.tuning.golden import DIGITS, minimise
from cachetune_rag.measuring.tuning.result import Point

FINALISTS = 3
"""How many of the best settings are measured again before one of them is chosen."""


class Measured(Protocol):
    """Times one setting."""

    def ttft(self, ratio: float, skipped: float) -> float:
        """Seconds to the first token, measured once on each prompt: the mean over the prompts."""

    def ready(self, ratio: float, skipped: float) -> None:
        """Do whatever makes a setting's first request slower than its others, such as compiling."""


@dataclass(frozen=True)
class Line:
    """A family of settings, one for each ratio r, among which the fastest is sought.

    Attributes:
        low, high: the bounds of r.
        selected: the share of the chunk tokens that the selector chooses, which is the quality floor. What r has beyond it is
            recomputed only because that takes less time than reading, so its rows are skipped.
        steps: for a tier that is read in blocks of rows, the ratios (ascending) from which on one block less is read of each chunk. The
            time falls at each step and grows up to the next, so the minimum is at a step, where a golden-section search would end
            only by luck.
    """

    low: float
    high: float
    selected: float
    steps: tuple[float, ...] = ()

    def around(self, ratio: float) -> list[float]:
        """The two steps at or below `ratio`, and the one above it."""
        above = bisect_right(self.steps, ratio)
        return [step for step in self.steps[max(0, above - 2) : above + 1] if self.low <= step <= self.high]

    def skipped(self, ratio: float) -> float:
        """Share of the chunk tokens that is recomputed without being read, at `ratio`."""
        return max(0.0, round(ratio - self.selected, DIGITS + 1))


class Search:
    """Golden-section search on medians of measured times.

    Args:
        measured: times a setting.
        rounds: how often each setting is measured. The median counts.
        tolerance: how closely the best ratio is to be found.
        tell: called after each setting, with its point and the best so far.
    """

    def __init__(
        self,
        measured: Measured,
        *,
        rounds: int = 3,
        tolerance: float = 0.02,
        tell: Callable[[Point, Point], None] | None = None,
    ):
        self._measured, self._rounds, self._tolerance, self._tell = measured, rounds, tolerance, tell
        self._samples: dict[tuple[float, float], list[float]] = {}

    def search(self, lines: list[Line], start: float) -> Point:
        """The setting with the least time on any of the lines. `start` is the ratio to begin with."""
        for line in lines:
            # The floor is best for a fast tier, so it is always measured, even if a disturbed measurement leads the search elsewhere.
            self._time(line.low, line.skipped(line.low))
            known = minimise(
                lambda ratio, line=line: self._time(ratio, line.skipped(ratio)),  # type: ignore[misc]
                line.low,
                line.high,
                start=start,
                tolerance=self._tolerance,
            )
            looked_at: set[float] = set()
            while (at := min(known, key=known.__getitem__)) not in looked_at:
                looked_at.add(at)
                known |= {ratio: self._time(ratio, line.skipped(ratio)) for ratio in line.around(at)}
        # One lucky measurement must not decide. The best settings are measured again in turns, so that drift affects all of them alike.
        best = sorted(self.points, key=lambda p: p.ttft)[:FINALISTS]
        if len(best) > 1:
            for _ in range(self._rounds):
                for point in best:
                    self._add(point.ratio, point.skipped)
        return self._best()

    @property
    def points(self) -> tuple[Point, ...]:
        """Everything that was measured, by ascending ratio."""
        return tuple(self._point(*setting) for setting in sorted(self._samples))

    def _time(self, ratio: float, skipped: float) -> float:
        if (ratio, skipped) in self._samples:
            return self._point(ratio, skipped).ttft
        self._measured.ready(ratio, skipped)
        for _ in range(self._rounds):
            self._add(ratio, skipped)
        point = self._point(ratio, skipped)
        if self._tell is not None:
            self._tell(point, self._best())
        return point.ttft

    def _add(self, ratio: float, skipped: float) -> None:
        self._samples.setdefault((ratio, skipped), []).append(self._measured.ttft(ratio, skipped))

    def _point(self, ratio: float, skipped: float) -> Point:
        samples = self._samples[ratio, skipped]
        return Point(ratio, skipped, statistics.median(samples), tuple(samples))

    def _best(self) -> Point:
        return min(self.points, key=lambda p: p.ttft)
