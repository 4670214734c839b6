"""The soak's results for people: a table, and plots of what was measured over time."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soak_common import Outcome

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MIB = 1 << 20


def write(outcomes: Sequence[Outcome], environment: dict[str, Any], out: Path) -> None:
    """The JSON file."""
    result = {"benchmark": "soak", "environment": environment, "parts": [asdict(outcome) for outcome in outcomes]}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")


def read(path: Path) -> list[Outcome]:
    """The outcomes in a JSON file that `write` made."""
    return [Outcome(**part) for part in json.loads(path.read_text())["parts"]]


def table(outcomes: Sequence[Outcome]) -> str:
    """The summary."""
    lines = ["| part | seconds | problems | figures |", "| --- | --- | --- | --- |"]
    for o in outcomes:
        figures = ", ".join(f"{name} {value}" for name, value in o.figures.items())
        lines.append(f"| {o.part} | {o.seconds:.0f} | {len(o.problems) or 'none'} | {figures} |")
    wrong = sum(len(o.problems) for o in outcomes)
    lines.append(f"| all | {sum(o.seconds for o in outcomes):.0f} | {wrong or 'none'} | |")
    return "\n".join(lines)


def plot(outcomes: Sequence[Outcome], stem: Path) -> list[Path]:
    """`STEM-bounds.svg`, if bounds ran; nothing without matplotlib. The files made."""
    made = []
    for o in outcomes:
        if not o.series:
            continue
        try:
            figure = _bounds(o)
        except ImportError:
            print("no plots: matplotlib is missing (pip install 'cachetune-rag[plot]')", file=sys.stderr)
            return made
        path = stem.with_name(f"{stem.name}-{o.part}.svg")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None})
        made.append(path)
    return made


def _bounds(outcome: Outcome) -> Figure:
    """Memory and open files over requests; memory while a corpus far larger than the budgets is precomputed."""
    from matplotlib.figure import Figure

    requests, corpus = outcome.series["requests"], outcome.series["corpus"]
    figure = Figure(figsize=(8, 7), layout="constrained")
    memory, files, job = figure.subplots(3, 1)
    memory.plot(requests["number"], [value / MIB for value in requests["memory"]], linewidth=1)
    memory.set(xlabel="requests", ylabel="MiB", title="memory of the process")
    files.plot(requests["number"], requests["files"], linewidth=1)
    files.set(xlabel="requests", ylabel="files", title="open files")
    budget = corpus["host budget"]
    job.plot(corpus["seconds"], [(value - corpus["before"]) / MIB for value in corpus["memory"]], linewidth=1)
    job.axhline(budget / MIB, color="#b3261e", linestyle=":", label="budget of host memory")
    job.set(
        xlabel="seconds",
        ylabel="MiB",
        title=f"memory more than before, precomputing {outcome.figures['precomputed (MiB)']:,.0f} MiB",
    )
    job.legend()
    for axes in (memory, files, job):
        axes.set_ylim(0, 1.15 * axes.dataLim.ymax)  # from 0: flat is to be seen as flat
        axes.title.set_fontsize(10)
    return figure
