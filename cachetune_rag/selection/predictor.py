"""Predicts how far a request will be from full prefill at each ratio, by the error that the ratio leaves.

Fitted by `CacheTune.calibrate` on a user's own prompts; docs/calibration.md says how, and docs/quality.md how well it works.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from cachetune_rag.checking.arguments import is_number
from cachetune_rag.report import Predicted

SHARE = 0.9
"""The share of requests that a prediction is to hold for."""
WINDOW = 0.25
"""The share of the observations that each quantile is taken of: those with about the same error."""
FEWEST = 20
"""From fewer observations nothing is predicted: 90% of fewer is nearly all of them."""


@dataclass(frozen=True)
class Observation:
    """What one sample showed at one ratio.

    Attributes:
        error_left: what the ratio left (`Choice.error_left`).
        kl, top1: how far the sample was from full prefill.
    """

    error_left: float
    kl: float
    top1: float


@dataclass(frozen=True)
class Predictor:
    """From the error that is left to a KL that most requests don't exceed, and a top-1 agreement that most reach.

    Attributes:
        ratios: those that a request may take, ascending.
        errors: knots, ascending. The first is 0, where nothing is off.
        kl: at each knot, in nats a token; never falling.
        top1: at each knot; never rising.
        share: the share of requests that this is to hold for.
    """

    ratios: tuple[float, ...]
    errors: tuple[float, ...]
    kl: tuple[float, ...]
    top1: tuple[float, ...]
    share: float = SHARE

    @classmethod
    def fit(cls, ratios: Sequence[float], seen: Sequence[Observation], share: float = SHARE) -> Self | None:
        """Fit to what was observed at these ratios; None if that is too little.

        The quantile of KL among observations with about the same error is made monotone in the error (isotonic regression).
        """
        if len(seen) < FEWEST or not ratios:
            return None
        seen = sorted(seen, key=lambda each: each.error_left)
        errors = np.array([each.error_left for each in seen])
        around = max(FEWEST, round(WINDOW * len(seen)))
        starts = range(0, len(seen) - around + 1, max(1, around // 8))
        kl = np.array([each.kl for each in seen])
        off = np.array([1 - each.top1 for each in seen])
        knots = np.array([np.median(errors[start : start + around]) for start in starts])
        return cls(
            tuple(sorted(ratios)),
            (0.0, *knots.tolist()),
            (0.0, *_rising(_quantiles(kl, starts, around, share)).tolist()),
            (1.0, *(1 - _rising(_quantiles(off, starts, around, share))).tolist()),
            share,
        )

    def predict(self, errors: Sequence[float]) -> tuple[Predicted, ...]:
        """What is predicted for a request, by the error that each of `ratios` leaves."""
        return tuple(
            Predicted(ratio, error, self._kl(error), self._top1(error))
            for ratio, error in zip(self.ratios, errors, strict=True)
        )

    def as_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Self:
        """What `as_dict` gave.

        Raises:
            KeyError, TypeError, ValueError: it is no such dict.
        """
        ratios, errors, kl, top1 = (tuple(map(float, saved[name])) for name in ("ratios", "errors", "kl", "top1"))
        made = cls(ratios, errors, kl, top1, float(saved["share"]))
        numbers = [*made.ratios, *made.errors, *made.kl, *made.top1]
        lengths = {len(made.errors), len(made.kl), len(made.top1)}
        rising = all(list(each) == sorted(each) for each in (made.ratios, made.errors, made.kl, made.top1[::-1]))
        if not made.ratios or lengths == {0} or len(lengths) > 1 or not rising or not all(map(is_number, numbers)):
            raise ValueError("its numbers are no prediction")
        return made

    def _kl(self, error: float) -> float:
        if error > self.errors[-1] > 0:
            # More error than calibration saw. To second order, KL grows with its square.
            return self.kl[-1] * (error / self.errors[-1]) ** 2
        return float(np.interp(error, self.errors, self.kl))

    def _top1(self, error: float) -> float:
        if error > self.errors[-1] > 0:
            return max(0.0, 1 - (1 - self.top1[-1]) * error / self.errors[-1])
        return float(np.interp(error, self.errors, self.top1))


def _quantiles(values: NDArray[np.float64], starts: Sequence[int], count: int, share: float) -> NDArray[np.float64]:
    """The quantile of each window of `count` values: one of them, and not one between two."""
    return np.array([np.quantile(values[start : start + count], share, method="higher") for start in starts])


def _rising(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The nearest numbers, by least squares, that never fall: neighbours that fall are replaced by their mean (pool adjacent violators)."""
    pools: list[list[float]] = []  # of each: sum, count
    for value in values.tolist():
        pools.append([value, 1])
        while len(pools) > 1 and pools[-2][0] * pools[-1][1] > pools[-1][0] * pools[-2][1]:
            total, count = pools.pop()
            pools[-1][0] += total
            pools[-1][1] += count
    # Rounding of the means must not make them fall.
    return np.maximum.accumulate(np.repeat([total / count for total, count in pools], [int(n) for _, n in pools]))
