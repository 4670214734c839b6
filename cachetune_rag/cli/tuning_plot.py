"""The plot of a tuning: time to first token against the ratio, a panel a tier, with the roofline and the choice."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from cachetune_rag.measuring.tuning import Point, TierTuning, TuningResult

_MEASURED, _SPREAD, _ROOF, _FULL, _CHOICE = "#1f5fa8", "#9bb8d9", "#b3261e", "#777777", "#2e7d32"

_STEPS = 200


def draw(result: TuningResult) -> Figure:
    """A figure of its own, so no display or global state is touched."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1 + 3.6 * len(result.tiers)), layout="constrained")
    panels = figure.subplots(len(result.tiers), 1, squeeze=False, sharex=True)[:, 0]
    for axes, tier in zip(panels, result.tiers, strict=True):
        _panel(axes, tier)
    panels[-1].set_xlabel("ratio: share of chunk tokens recomputed")
    figure.suptitle(result.hardware)
    return figure


def _panel(axes: Axes, tier: TierTuning) -> None:
    for points, mark, line, label in _kinds(tier):
        ratios, times = [p.ratio for p in points], [p.ttft * 1e3 for p in points]
        axes.vlines(
            ratios, [min(p.samples) * 1e3 for p in points], [max(p.samples) * 1e3 for p in points], color=_SPREAD
        )
        axes.plot(ratios, times, marker=mark, color=_MEASURED, label=f"measured, {label}")
        selected = points[0].ratio - points[0].skipped
        grid = [tier.r_min + (tier.r_max - tier.r_min) * i / _STEPS for i in range(_STEPS + 1)]
        roof = [tier.cost.roofline(r, max(0.0, r - selected)) * 1e3 for r in grid]
        axes.plot(grid, roof, linestyle=line, color=_ROOF, label=f"max(compute, transfer), {label}")
    axes.axhline(tier.full * 1e3, color=_FULL, linestyle=":", label="full prefill")
    axes.axvline(tier.ratio, color=_CHOICE, linestyle=":", label=f"chosen {tier.ratio:g} (skipped {tier.skipped:g})")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("time to first token, ms")
    axes.set_title(f"{tier.tier} ({tier.codec}, {tier.selector})")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def _kinds(tier: TierTuning) -> list[tuple[list[Point], str, str, str]]:
    """The points by who chose what is recomputed: the offline ranking all of it, or the selector its share."""
    offline = [p for p in tier.points if p.skipped == p.ratio]
    online = [p for p in tier.points if p.skipped != p.ratio]
    kinds = [(online, "o", "-", "selector and skipped rows"), (offline, "s", "--", "skipped rows only")]
    return [kind for kind in kinds if kind[0]]
