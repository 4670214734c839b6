"""What the tuner found."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from cachetune_rag.checking.arguments import is_number
from cachetune_rag.measuring.tuning.cost import CostModel


@dataclass(frozen=True)
class Point:
    """One measured setting.

    Attributes:
        ratio: share of the chunk tokens that was recomputed.
        skipped: share that was recomputed unread; part of `ratio`.
        ttft: seconds to the first token, the median.
        samples: what it is the median of, each the mean over the prompts.
    """

    ratio: float
    skipped: float
    ttft: float
    samples: tuple[float, ...]


@dataclass(frozen=True)
class TierTuning:
    """The setting for one tier, codec and selector.

    Attributes:
        tier, codec, selector: what it is for.
        ratio, skipped: the setting; see `ReuseConfig`.
        ttft: its seconds to the first token.
        full: seconds of full prefill of the same prompts, with this engine.
        r_min, r_max: the bounds that were kept.
        calibrated: whether r_min is a calibrated one.
        warm_start: the ratio at which the search began.
        cost: measured times to move and to compute.
        prompts: how many prompts were measured.
        points: everything that was measured, by ratio.
        saved: whether later engines on this store find it.
    """

    tier: str
    codec: str
    selector: str
    ratio: float
    skipped: float
    ttft: float
    full: float
    r_min: float
    r_max: float
    calibrated: bool
    warm_start: float
    cost: CostModel
    prompts: int
    points: tuple[Point, ...]
    saved: bool = False

    @property
    def speedup(self) -> float:
        """Full prefill over reuse."""
        return self.full / self.ttft if self.ttft > 0 else float("inf")

    def as_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> TierTuning:
        """What `as_dict` gave, perhaps through JSON.

        Raises:
            KeyError, TypeError, ValueError: it isn't that.
        """
        fields = {f.name: content[f.name] for f in dataclasses.fields(cls)}
        fields["cost"] = CostModel(**fields["cost"])
        fields["points"] = tuple(Point(**{**p, "samples": tuple(p["samples"])}) for p in fields["points"])
        numbers = [fields[name] for name in ("ratio", "skipped", "ttft", "full", "r_min", "r_max")]
        if not all(map(is_number, numbers)):
            raise TypeError("a number is none")
        tuning = cls(**fields)
        if not 0 <= tuning.skipped <= tuning.ratio <= 1:
            raise ValueError(f"ratio {tuning.ratio}, skipped {tuning.skipped}")
        return tuning


@dataclass(frozen=True)
class TuningResult:
    """All that one run found.

    Attributes:
        hardware: what it was measured on.
        tiers: one entry a tier, fast ones first.
    """

    hardware: str
    tiers: tuple[TierTuning, ...]

    def as_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        lines = [self.hardware]
        for t in self.tiers:
            lines.append(
                f"{t.tier} ({t.codec}, {t.selector}): ratio {t.ratio:g}, of it {t.skipped:g} not read; first token after "
                f"{t.ttft * 1e3:.1f} ms, {t.speedup:.1f}x as soon as full prefill"
            )
        return "\n".join(lines)


@dataclass(frozen=True)
class TuneProgress:
    """How far a tuning is; handed to its callback after every measured setting.

    Attributes:
        tier: the tier at hand.
        tiers: all that will be tuned.
        measured: settings of this tier measured so far, repeats included.
        point: the last of them.
        best: the one with the least time so far.
        seconds: since the start.
    """

    tier: str
    tiers: tuple[str, ...]
    measured: int
    point: Point
    best: Point
    seconds: float
