"""What a calibration found."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cachetune_rag.selection.predictor import Predictor


@dataclass(frozen=True)
class RatioFigures:
    """How close to full prefill the samples were at one ratio.

    Attributes:
        ratio: share of the chunk tokens that was recomputed.
        kl: KL(full || reuse) in nats a target token, as the mean over the samples' means.
        kl_worst: the largest of the samples' means.
        top1: share of target tokens that reuse, too, finds the likeliest, as the mean over samples.
        top1_worst: the smallest of the samples' shares.
        statistic: the number that is compared with the bound.
        within: whether it keeps the bound.
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
        ratio: the smallest measured ratio that keeps the bound, as all larger measured ones do. 1.0 (everything is computed, so nothing
            differs) if there is none.
        met: whether there is such a ratio below 1.
        selector: the selector that it is for.
        measure, bound: "kl" and the most nats a token, or "top1" and the least share of tokens.
        quantile: None if the mean over samples keeps the bound; otherwise the share of the samples that each keep it.
        samples: how many prompts were measured.
        target_tokens: how many tokens were compared, over all samples.
        figures: what was measured, by ascending ratio.
        predictor: predicts single requests' first tokens, for `max_kl` and `min_top1`; None where the selector scores nothing, or too little was
            measured.
        saved: whether later engines on the store will find it. False for a store in memory, or one that can't be written.
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
    predictor: Predictor | None = None
    saved: bool = False

    def as_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return dataclasses.asdict(self)


def choose(figures: Sequence[RatioFigures]) -> float | None:
    """The smallest ratio that keeps the bound, as all larger ones do. None if there is none.

    A larger ratio isn't closer to full prefill every time, above all on few samples. A ratio that keeps the bound while a larger one
    doesn't is no quality floor, because tuning may choose any ratio above the floor.
    """
    found = None
    for each in sorted(figures, key=lambda f: -f.ratio):
        if not each.within:
            break
        found = each.ratio
    return found
