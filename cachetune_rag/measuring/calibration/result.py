"""What a calibration found."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class RatioFigures:
    """What one ratio did to the samples.

    Attributes:
        ratio: share of the chunk tokens that was recomputed.
        kl: KL(full || reuse) in nats a target token; the mean over samples of each sample's mean.
        kl_worst: the largest sample's mean.
        top1: share of target tokens that reuse finds likeliest as well; mean over samples.
        top1_worst: the smallest sample's share.
        statistic: what is held against the bound.
        within: whether it stays within.
    """

    ratio: float
    kl: float
    kl_worst: float
    top1: float
    top1_worst: float
    statistic: float
    within: bool


@dataclass(frozen=True)
class Calibration:
    """The result of `CacheTune.calibrate`.

    Attributes:
        ratio: the smallest measured ratio that keeps the bound, as do all larger ones measured; 1.0 (everything is computed: exact) if
            there is none.
        met: whether there is one below 1.
        selector: whose ratio it is.
        measure, bound: "kl" and the most nats a token, or "top1" and the least share of tokens.
        quantile: None: the mean over samples keeps the bound; q: at least this share of the samples does, each by itself.
        samples: prompts measured.
        target_tokens: tokens measured, over all samples.
        figures: by ratio, ascending.
        saved: whether later engines on the store will find it (False for a store in memory, or one that can't be written).
    """

    ratio: float
    met: bool
    selector: str
    measure: str
    bound: float
    quantile: float | None
    samples: int
    target_tokens: int
    figures: tuple[RatioFigures, ...]
    saved: bool = False

    def as_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return dataclasses.asdict(self)


def choose(figures: Sequence[RatioFigures]) -> float | None:
    """The smallest ratio that is within the bound with all larger ones.

    More recomputation is not closer every single time, on a few samples least of all. A ratio that happens to dip below the
    bound between others that don't is no floor: the tuner goes upwards from here.
    """
    found = None
    for each in sorted(figures, key=lambda f: -f.ratio):
        if not each.within:
            break
        found = each.ratio
    return found
