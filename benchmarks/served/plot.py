"""Plots of what `serving.py` measured. Need matplotlib (the extra `plot`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from served.plan import SETTINGS
from served.report import Content, contexts_of, group
from served.timeline import LANES

# Okabe and Ito's colours, which colour-blind readers tell apart.
_COLOURS = dict(zip(SETTINGS, ("#D55E00", "#0072B2", "#009E73", "#E69F00", "#56B4E9", "#CC79A7"), strict=True))
_VLLM = "vLLM, all read"


def plot(content: Content, folder: Path, stem: str) -> list[Path]:
    """Plot how many times sooner and more requests are answered, how late answers begin under load, and what a GPU did for one prompt. Returns the files written."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    groups: Mapping[str, Any] = content["groups"]
    env = content["environment"]
    title = f"{env.get('gpu') or env['processor']}, vLLM {env.get('vllm')}, commit {env['commit']}"
    made = []
    for name, draw, contexts in (
        ("ratios", _ratios, contexts_of(groups, "alone")),
        ("arrivals", _arrivals, contexts_of(groups, "arrivals")),
        ("timeline", _timeline, contexts_of(groups, "timeline")),
    ):
        if contexts:
            made.append(folder / f"{stem}-{name}.svg")
            _save(draw(groups, contexts), made[-1], title)
    return made


def _ratios(groups: Mapping[str, Any], contexts: Sequence[int]) -> Any:
    from matplotlib import pyplot

    shown = [s for s in SETTINGS if any(group(groups, "reuse", "alone", context, s) for context in contexts)]
    height = 0.8 / len(shown)
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 1 + 0.4 * len(contexts) * len(shown)), squeeze=False)
    for panel, (phase, label) in zip(
        panels[0], (("alone", "times sooner the first token, alone"), ("saturated", "times the requests/s, saturated")), strict=True
    ):  # fmt: skip
        for number, setting in enumerate(shown):
            ratios = [_ratio(groups, phase, context, setting) for context in contexts]
            places = [place + height * (number - (len(shown) - 1) / 2) for place in range(len(contexts))]
            bars = panel.barh(places, ratios, height=0.92 * height, color=_COLOURS[setting], label=setting)
            panel.bar_label(bars, [f"{r:.1f}x" if r else "" for r in ratios], padding=2, fontsize="small")
        panel.set_yticks(range(len(contexts)), [f"{context:,}" for context in contexts])
        panel.set_ylabel("tokens of chunks")
        panel.axvline(1, color="black", linewidth=0.8)
        panel.invert_yaxis()
        panel.margins(x=0.15)
        panel.set_xlabel(label)
    panels[0][0].legend(fontsize="small", frameon=False)
    return figure


def _ratio(groups: Mapping[str, Any], phase: str, context: int, setting: str) -> float:
    base, mine = group(groups, "vllm", phase, context), group(groups, "reuse", phase, context, setting)
    if base is None or mine is None:
        return 0.0
    if phase == "alone":
        return float(base["ttft"]["median"] / mine["ttft"]["median"])
    return float(mine["requests_per_second"] / base["requests_per_second"])


def _arrivals(groups: Mapping[str, Any], contexts: Sequence[int]) -> Any:
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator

    figure, panels = pyplot.subplots(1, len(contexts), figsize=(4.5 * len(contexts), 4), squeeze=False)
    for panel, context in zip(panels[0], contexts, strict=True):
        for setting, colour in {"": "black", **_COLOURS}.items():
            start = f"{'reuse' if setting else 'vllm'}/arrivals/{context}/{setting}/"
            points = sorted((g["rate"], 1e3 * g["ttft"]["p99"]) for name, g in groups.items() if name.startswith(start))
            if points:
                panel.plot(*zip(*points, strict=True), "o-", color=colour, label=setting or _VLLM)
        panel.axhline(1e3, color="grey", linestyle=":", linewidth=0.8)
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter("{x:,g}")
        panel.minorticks_off()
        panel.set_title(f"{context:,} tokens of chunks")
        panel.set_xlabel("requests/s that arrive (Poisson)")
        panel.set_ylabel("time to first token, p99, ms")
        panel.grid(alpha=0.3)
    panels[0][0].legend(fontsize="small", frameon=False)
    return figure


def _timeline(groups: Mapping[str, Any], contexts: Sequence[int]) -> Any:
    from matplotlib import pyplot

    shown = [
        (context, setting, found["lanes"]["spans"])
        for context in contexts
        for setting in SETTINGS
        if (found := group(groups, "reuse", "timeline", context, setting)) is not None
    ]
    figure, panels = pyplot.subplots(len(shown), 1, figsize=(9, 0.5 + 1.2 * len(shown)), squeeze=False)
    for (panel,), (context, setting, spans) in zip(panels, shown, strict=True):
        for number, lane in enumerate(LANES):
            colour = "grey" if lane == "steps" else _COLOURS[setting]
            panel.broken_barh([(1e3 * a, 1e3 * (b - a)) for a, b in spans[lane]], (number - 0.4, 0.8), color=colour)
        panel.set_yticks(range(len(LANES)), list(LANES.values()), fontsize="small")
        panel.set_ylim(len(LANES) - 0.5, -0.5)
        panel.set_xlim(left=0)
        panel.set_title(f"{context:,} tokens of chunks, {setting}", fontsize="small")
    panels[-1][0].set_xlabel("ms from the first copy on")
    return figure


def _save(figure: Any, path: Path, title: str) -> None:
    from matplotlib import pyplot

    figure.suptitle(title, fontsize="small")
    figure.set_layout_engine("constrained")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
