"""Predicts how far the first token of an answer will be from full prefill at each ratio, by a sign that the request shows.

Fitted by `CacheTune.calibrate` on a user's own prompts; docs/calibration.md says how, and docs/quality-bound.md how well it works.
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
"""The share of requests that a predicted KL is to hold for."""
WINDOW = 0.25
"""The share of the observations that each figure is taken of: those with about the same sign."""
FEWEST = 20
"""The least observations that a figure is taken of: 90% of fewer is nearly all of them."""
FEWEST_PROMPTS = 10
"""From fewer prompts nothing is predicted. What one prompt shows at several ratios is alike."""


@dataclass(frozen=True)
class Observation:
    """What one sample showed at one ratio.

    Attributes:
        sample: number of the sample.
        sign: the request's (`Choice.sign`).
        kl: of the answer's first token, in nats.
        same: whether full prefill, too, finds it the likeliest.
    """

    sample: int
    sign: float
    kl: float
    same: bool


@dataclass(frozen=True)
class Predictor:
    """From a sign to a KL that most requests don't exceed, and to how likely it is that the first token stays the same.

    Attributes:
        ratios: those that a request may take, ascending.
        signs: knots, ascending.
        kl: at each knot, in nats; never falling.
        top1: at each knot; never rising.
        share: the share of requests that `kl` is to hold for.
    """

    ratios: tuple[float, ...]
    signs: tuple[float, ...]
    kl: tuple[float, ...]
    top1: tuple[float, ...]
    share: float = SHARE

    @classmethod
    def fit(cls, ratios: Sequence[float], seen: Sequence[Observation], share: float = SHARE) -> Self | None:
        """Fit to what was observed at these ratios; None if that is of too few prompts.

        The quantile of KL among observations with about the same sign is made monotone in the sign (isotonic regression), and so is the share of
        them whose first token is another one. One more prompt with another token is counted than there were, because few prompts can't show that
        there are none.
        """
        if len({each.sample for each in seen}) < FEWEST_PROMPTS or not ratios:
            return None
        seen = sorted(seen, key=lambda each: each.sign)
        samples, signs = np.array([each.sample for each in seen]), np.array([each.sign for each in seen])
        around = min(len(seen), max(FEWEST, round(WINDOW * len(seen))))
        starts = range(0, len(seen) - around + 1, max(1, around // 8))
        windows = [slice(start, start + around) for start in starts]
        kl = np.array([each.kl for each in seen])
        other = np.array([not each.same for each in seen])
        # A quantile is one of the values, and not one between two.
        most = np.array([np.quantile(kl[window], share, method="higher") for window in windows])
        one_more = np.array(
            [around / len(np.unique(samples[window])) for window in windows]
        )  # observations of a prompt
        off = (np.array([other[window].sum() for window in windows]) + one_more) / (around + one_more)
        return cls(
            tuple(sorted(ratios)),
            tuple(float(np.median(signs[window])) for window in windows),
            tuple(_rising(most).tolist()),
            tuple((1 - _rising(off)).tolist()),
            share,
        )

    def predict(self, signs: Sequence[float]) -> tuple[Predicted, ...]:
        """What is predicted for a request that has these signs at `ratios`. A smaller sign than the smallest knot is predicted as that: whoever
        shows no sign of an error may still be wrong, and no observation says how often.
        """
        return tuple(
            Predicted(ratio, sign, self._kl(sign), self._top1(sign))
            for ratio, sign in zip(self.ratios, signs, strict=True)
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
        ratios, signs, kl, top1 = (tuple(map(float, saved[name])) for name in ("ratios", "signs", "kl", "top1"))
        made = cls(ratios, signs, kl, top1, float(saved["share"]))
        numbers = [*made.ratios, *made.signs, *made.kl, *made.top1]
        lengths = {len(made.signs), len(made.kl), len(made.top1)}
        rising = all(list(each) == sorted(each) for each in (made.ratios, made.signs, made.kl, made.top1[::-1]))
        if not made.ratios or lengths == {0} or len(lengths) > 1 or not rising or not all(map(is_number, numbers)):
            raise ValueError("its numbers are no prediction")
        return made

    def _kl(self, sign: float) -> float:
        if sign > self.signs[-1] > 0:
            # More than calibration saw. To second order, KL grows with the square of an error.
            return self.kl[-1] * (sign / self.signs[-1]) ** 2
        return float(np.interp(sign, self.signs, self.kl))

    def _top1(self, sign: float) -> float:
        if sign > self.signs[-1] > 0:
            return max(0.0, 1 - (1 - self.top1[-1]) * sign / self.signs[-1])
        return float(np.interp(sign, self.signs, self.top1))


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
