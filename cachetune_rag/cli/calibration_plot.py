"""The plot of a calibration: KL and top-1 agreement against the ratio, the bound, and the choice."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from cachetune_rag.measuring.calibration.result import Calibration

_MEAN, _WORST, _BOUND, _CHOICE = "#1f5fa8", "#9bb8d9", "#b3261e", "#2e7d32"


def draw(calibration: Calibration) -> Figure:
    """Two panels over one ratio axis. A figure of its own, so no display or global state is touched."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6.5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    figures = calibration.figures
    ratios = [f.ratio for f in figures]
    _panel(above, ratios, [f.kl for f in figures], [f.kl_worst for f in figures], calibration, "kl")
    above.set_ylabel("KL(full || reuse), nats a token")
    above.set_ylim(bottom=0)
    _panel(below, ratios, [f.top1 for f in figures], [f.top1_worst for f in figures], calibration, "top1")
    below.set_ylabel("top-1 agreement")
    below.set_xlabel("ratio: share of chunk tokens recomputed")
    figure.suptitle(
        f"{calibration.selector}: ratio {calibration.ratio:g}"
        + ("" if calibration.met else " (no measured ratio keeps the bound)")
        + f"\n{calibration.samples} samples, {calibration.target_tokens} tokens"
    )
    return figure


def _panel(
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
