"""Plots fidelity by compute, with one panel for each set. Needs matplotlib (the extra `plot`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .report import SETS, Point, equal_compute
from .settings import BASELINE, EVERYTHING, NOTHING

# Okabe and Ito's colours, which colour-blind readers tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C8C8C")
_MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
_LINES = {"first_token": ":"}


def plot(points: Sequence[Point], path: Path, title: str) -> None:
    """Plot the share of the KL gap that is closed, with 95% intervals, by the compute that it took, the probe's included."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [p for p in equal_compute(points) if p.setting.codec == BASELINE.codec and not math.isnan(p.share.value)]
    names = [n for n in SETS if any(p.set == n for p in shown)]
    selectors = sorted({p.setting.selector for p in shown} - {NOTHING, EVERYTHING})
    figure, panels = pyplot.subplots(1, len(names), figsize=(6 * len(names), 5), sharey=True, squeeze=False)
    for panel, name in zip(panels[0], names, strict=True):
        for lead_in in dict.fromkeys(p.setting.lead_in for p in shown):
            own = [p for p in shown if p.set == name and p.setting.lead_in == lead_in]
            for number, selector in enumerate(selectors):
                line = [p for p in own if p.setting.selector in (selector, NOTHING)]
                if len(line) > 1:
                    _draw(panel, sorted(line, key=lambda p: p.setting.ratio), f"{selector}, {lead_in}", number)
        panel.set_xscale("symlog", linthresh=0.02, linscale=0.5)
        ticks = sorted({p.setting.ratio for p in shown if p.setting.selector != EVERYTHING})
        panel.set_xticks(ticks, [f"{t:g}" for t in ticks])
        panel.minorticks_off()
        panel.set_xlim(left=-0.002)
        panel.set_xlabel("compute spent / compute of all chunk tokens")
        panel.set_title(f"{name} ({max(p.records for p in shown if p.set == name)} records)")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("share of the KL gap closed, %")
    handles: dict[str, Any] = {}
    for panel in panels[0]:
        handles.update({label: handle for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)})
    figure.suptitle(title)
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize="small", frameon=False
    )
    figure.set_layout_engine("constrained")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)


def _draw(panel: Any, line: Sequence[Point], label: str, number: int) -> None:
    x = [p.compute for p in line]
    y = [100 * p.share.value for p in line]
    below = [100 * (p.share.value - p.share.low) for p in line]
    above = [100 * (p.share.high - p.share.value) for p in line]
    style = _LINES.get(line[0].setting.lead_in, "-")
    colour, mark = _COLOURS[number % len(_COLOURS)], _MARKS[number % len(_MARKS)]
    drawn = panel.errorbar(
        x, y, yerr=[below, above], label=label, linestyle=style, marker=mark, color=colour, markersize=5, elinewidth=0.7
    )
    for bar in drawn[2]:
        bar.set_alpha(0.35)
