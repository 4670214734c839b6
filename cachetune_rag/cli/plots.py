"""Plots of calibrations and tunings, drawn by matplotlib (the extra `plot`)."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from cachetune_rag.cli.console import UsageError
from cachetune_rag.cli.written import check_writable, write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from cachetune_rag.measuring.calibration.result import Calibration
    from cachetune_rag.measuring.tuning import Point, TierTuning, TuningResult

_MEAN, _WORST, _BOUND, _CHOICE, _FULL = "#1f5fa8", "#9bb8d9", "#b3261e", "#2e7d32", "#777777"
"""Colours. In the plot of a tuning they are for measured times, their spread, the lower bound, the choice, and full prefill."""

_ROOFLINE_POINTS = 200

SUFFIXES = (".svg", ".png", ".pdf")


def check_plot(path: Path) -> None:
    """Refuse a plot that can't be written, before anything is measured.

    Raises:
        UsageError: the kind of file is unknown, or the folder or matplotlib is missing.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"--plot {path} has no known ending: use {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}.")
    check_writable(path, "--plot")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise UsageError("--plot needs matplotlib: pip install 'cachetune-rag[plot]', or leave --plot out.") from None


def save_plot(figure: Figure, path: Path) -> None:
    """Write a figure, so that the file is whole or not there at all."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format=path.suffix.lower().removeprefix("."))
    write_whole(path, drawn.getvalue())


def draw_calibration(calibration: Calibration) -> Figure:
    """KL and top-1 agreement against the ratio, with the bound and the choice. Neither a display nor matplotlib's global state is used."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6.5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    figures = calibration.figures
    ratios = [f.ratio for f in figures]
    _calibration_panel(above, ratios, [f.kl for f in figures], [f.kl_worst for f in figures], calibration, "kl")
    above.set_ylabel("KL(full || reuse), nats a token")
    above.set_ylim(bottom=0)
    _calibration_panel(below, ratios, [f.top1 for f in figures], [f.top1_worst for f in figures], calibration, "top1")
    below.set_ylabel("top-1 agreement")
    below.set_xlabel("ratio: share of chunk tokens recomputed")
    figure.suptitle(
        f"{calibration.selector}: ratio {calibration.ratio:g}"
        + ("" if calibration.met else " (no measured ratio keeps the bound)")
        + f"\n{calibration.samples} samples, {calibration.target_tokens} tokens"
    )
    return figure


def _calibration_panel(
    axes: Axes, ratios: list[float], mean: list[float], worst: list[float], calibration: Calibration, measure: str
) -> None:
    axes.plot(ratios, worst, marker="o", markersize=3, color=_WORST, label="worst sample")
    axes.plot(ratios, mean, marker="o", color=_MEAN, label="mean of samples")
    quantile = calibration.quantile
    if calibration.measure == measure:
        if quantile is not None:
            held = [f.statistic for f in calibration.figures]
            axes.plot(ratios, held, marker="o", markersize=4, color="black", label=f"kept by {quantile:.0%} of samples")
        axes.axhline(calibration.bound, color=_BOUND, linestyle="--", label=f"bound {calibration.bound:g}")
    axes.axvline(calibration.ratio, color=_CHOICE, linestyle=":", label=f"chosen {calibration.ratio:g}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def draw_tuning(result: TuningResult) -> Figure:
    """Time to first token against the ratio, with the lower bound and the choice, and a panel for each tier. As `draw_calibration`, it uses no global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1 + 3.6 * len(result.tiers)), layout="constrained")
    panels = figure.subplots(len(result.tiers), 1, squeeze=False, sharex=True)[:, 0]
    for axes, tier in zip(panels, result.tiers, strict=True):
        _tuning_panel(axes, tier)
    panels[-1].set_xlabel("ratio: share of chunk tokens recomputed")
    figure.suptitle(result.hardware)
    return figure


def _tuning_panel(axes: Axes, tier: TierTuning) -> None:
    for points, mark, line, label in _by_choice(tier):
        ratios, times = [p.ratio for p in points], [p.ttft * 1e3 for p in points]
        axes.vlines(
            ratios, [min(p.samples) * 1e3 for p in points], [max(p.samples) * 1e3 for p in points], color=_WORST
        )
        axes.plot(ratios, times, marker=mark, color=_MEAN, label=f"measured, {label}")
        selected = points[0].ratio - points[0].skipped
        grid = [tier.r_min + (tier.r_max - tier.r_min) * i / _ROOFLINE_POINTS for i in range(_ROOFLINE_POINTS + 1)]
        roof = [tier.cost.roofline(r, max(0.0, r - selected)) * 1e3 for r in grid]
        axes.plot(grid, roof, linestyle=line, color=_BOUND, label=f"max(compute, transfer), {label}")
    axes.axhline(tier.full * 1e3, color=_FULL, linestyle=":", label="full prefill")
    axes.axvline(tier.ratio, color=_CHOICE, linestyle=":", label=f"chosen {tier.ratio:g} (skipped {tier.skipped:g})")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("time to first token, ms")
    axes.set_title(f"{tier.tier} ({tier.codec}, {tier.selector})")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def _by_choice(tier: TierTuning) -> list[tuple[list[Point], str, str, str]]:
    """The points in two groups: those in which the offline ranking chose all recomputed tokens, and those in which the selector chose some."""
    offline = [p for p in tier.points if p.skipped == p.ratio]
    online = [p for p in tier.points if p.skipped != p.ratio]
    kinds = [(online, "o", "-", "selector and skipped rows"), (offline, "s", "--", "skipped rows only")]
    return [kind for kind in kinds if kind[0]]
