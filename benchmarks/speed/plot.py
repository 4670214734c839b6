"""Plots of a run's JSON. Needs matplotlib (the extra `plot`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .report import Content, Row, rows_of, setting

# Okabe and Ito's colours, which colour-blind readers tell apart.
_COLOURS = {"expected_error": "#0072B2", "frequency": "#D55E00", "probe": "#009E73", "none": "#CC79A7"}
_LINES = {0.05: "-", 0.15: "--"}
_GREY = "#8C8C8C"
_SHOWN = ("target", "device", "int8", "disk", "peers", "kvboost")


def plot(content: Content, folder: Path, stem: str) -> list[Path]:
    """Plot time to first token by context, and speed-ups by tier. Returns the files that were written."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    rows, made = rows_of(content), []
    for name, draw, shown in (
        ("ttft", _against_context, [r for r in rows if r["phase"] == "target"]),
        ("speedup", _bars, [r for r in rows if r["phase"] in _SHOWN]),
    ):
        if shown:
            made.append(folder / f"{stem}-{name}.svg")
            _save(draw(shown), made[-1], setting(content))
    return made


def _against_context(rows: list[Row]) -> Any:
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator

    figure, panel = pyplot.subplots(figsize=(7, 5))
    full = {row["context"]: row["full"] for row in rows}
    panel.plot(list(full), [1e3 * t for t in full.values()], "o-", color="black", label="full prefill")
    for selector, ratio in dict.fromkeys((r["selector"], r["ratio"]) for r in rows):
        line = [r for r in rows if (r["selector"], r["ratio"]) == (selector, ratio)]
        style = {"color": _COLOURS.get(selector, _GREY), "linestyle": _LINES.get(ratio, "-.")}
        x = [r["context"] for r in line]
        panel.plot(x, [1e3 * r["ttft"]["median"] for r in line], marker="o", label=f"{selector}, r {ratio:g}", **style)
        floors = [1e3 * r["floor"] for r in line]
        panel.plot(x, floors, linestyle=":", color=_COLOURS.get(selector, _GREY), alpha=0.6, label="their floors")
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xticks(list(full), [f"{context:,}" for context in full])
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter("{x:,g}")
    panel.minorticks_off()
    panel.set_xlabel("chunk tokens")
    panel.set_ylabel("time to first token, ms")
    panel.grid(alpha=0.3)
    handles = dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
    panel.legend(handles.values(), handles.keys(), fontsize="small", frameon=False)
    return figure


def _bars(rows: list[Row]) -> Any:
    from matplotlib import pyplot

    contexts = sorted({row["context"] for row in rows})
    figure, panels = pyplot.subplots(1, len(contexts), figsize=(4 * len(contexts), 6), squeeze=False)
    for panel, context in zip(panels[0], contexts, strict=True):
        own = [row for row in rows if row["context"] == context]
        labels = [_label(r) for r in own]
        colours = [_COLOURS.get(r.get("selector", ""), _GREY) for r in own]
        bars = panel.barh(labels, [r["speedup"] for r in own], color=colours)
        panel.bar_label(bars, [f"{r['speedup']:.1f}x" for r in own], padding=2, fontsize="small")
        panel.axvline(1, color="black", linewidth=0.8)
        panel.invert_yaxis()
        panel.margins(x=0.15)
        panel.tick_params(labelsize="small")
        panel.set_title(f"{context:,} chunk tokens")
        panel.set_xlabel("full prefill / time to first token")
    return figure


def _label(row: Row) -> str:
    if "selector" not in row:
        return str(row["name"])
    return f"{row['tier']} {row['codec']}, {row['selector']} {row['ratio']:.2g}"


def _save(figure: Any, path: Path, title: str) -> None:
    from matplotlib import pyplot

    figure.suptitle(title, fontsize="small")
    figure.set_layout_engine("constrained")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
