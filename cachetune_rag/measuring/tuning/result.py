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
        skipped: the part of `ratio` whose stored rows were not even read.
        ttft: median of the seconds to the first token.
        samples: the measured times, each a mean over the prompts.
    """

    ratio: float
    skipped: float
    ttft: float
    samples: tuple[float, ...]


@dataclass(frozen=True)
class TierTuning:
    """The setting for one tier, codec and selector.

    Attributes:
        tier, codec, selector: what the setting is for.
        ratio, skipped: the setting; see `ReuseConfig`.
        ttft: seconds to the first token with this setting.
        full: seconds of full prefill of the same prompts, with this engine.
        r_min, r_max: the bounds between which the ratio was sought.
        calibrated: whether r_min is a calibrated ratio.
        warm_start: the ratio at which the search began.
        cost: measured times to move and to compute.
        prompts: how many prompts were measured.
        points: everything that was measured, by ascending ratio.
        saved: whether later engines on this store will find it.
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
        """Full prefill's time divided by that with reuse."""
        return self.full / self.ttft if self.ttft > 0 else float("inf")

    def as_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> TierTuning:
        """A tuning from what `as_dict` gave, perhaps written as JSON and read again.

        Raises:
            KeyError, TypeError, ValueError: the content is something else.
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
    """The result of `CacheTune.tune`.

    Attributes:
        hardware: what was measured on.
        tiers: one entry for each tier, the fastest tier first.
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
    """How far a tuning is. Its callback gets one after every measured setting.

    Attributes:
        tier: the tier that is being tuned.
        tiers: all tiers that will be tuned.
        measured: how many settings of this tier were measured so far.
        point: the setting measured last.
        best: the setting with the least time so far.
        seconds: time since the start.
    """

    tier: str
    tiers: tuple[str, ...]
    measured: int
    point: Point
    best: Point
    seconds: float
