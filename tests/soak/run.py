"""All of the soak at full length: `make soak`, or `python tests/soak/run.py`.

    python tests/soak/run.py --parts crashes damage --out benchmarks/results/soak.json

Prints a table at the end and ends with 1 if anything happened that must not. docs/reliability.md says what each part does.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "store"), str(HERE.parent.parent / "benchmarks")]

import soak_bounds
import soak_cancel
import soak_crashes
import soak_damage
import soak_faults
import soak_load
import torch
from common import environment
from soak_common import Outcome

PARTS: dict[str, Callable[[Path], Outcome]] = {
    "crashes": lambda folder: soak_crashes.run(folder, kills=200),
    "damage": lambda folder: soak_damage.run(folder, examples=1000),
    "faults": lambda folder: soak_faults.run(folder),
    "load": lambda folder: soak_load.run(folder, seconds=600, processes=8, threads=4),
    "bounds": lambda folder: soak_bounds.run(folder, requests=10_000, budget_mib=64),
    "cancel": lambda folder: soak_cancel.run(folder, interrupts=1000, cancels=10),
}


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--parts", nargs="+", choices=sorted(PARTS), default=list(PARTS))
    parser.add_argument("--out", type=Path, help="file for the JSON; plots of series go beside it")
    args = parser.parse_args()
    torch.set_num_threads(1)  # workers are forked, and many at once
    outcomes = [run(name) for name in args.parts]
    print(table(outcomes))
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(
            json.dumps(
                {"benchmark": "soak", "environment": environment(), "parts": [asdict(o) for o in outcomes]}, indent=1
            )
            + "\n"
        )
        plot(outcomes, args.out)
    sys.exit(any(o.problems for o in outcomes))


def run(name: str) -> Outcome:
    """One part, in a folder of its own."""
    print(f"{name} ...", file=sys.stderr, flush=True)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        outcome = PARTS[name](Path(folder))
    outcome.seconds = time.perf_counter() - started
    for problem in outcome.problems[:20]:
        print(f"{name}: {problem}", file=sys.stderr)
    return outcome


def table(outcomes: list[Outcome]) -> str:
    """The summary, for people."""
    lines = ["| part | seconds | problems | figures |", "| --- | --- | --- | --- |"]
    for o in outcomes:
        figures = ", ".join(f"{name} {value}" for name, value in o.figures.items())
        lines.append(f"| {o.part} | {o.seconds:.0f} | {len(o.problems) or 'none'} | {figures} |")
    return "\n".join(lines)


def plot(outcomes: list[Outcome], out: Path) -> None:
    """A line for each series, a picture for each part that has some; nothing without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plots: matplotlib is missing (pip install 'cachetune-rag[plot]')", file=sys.stderr)
        return
    for o in outcomes:
        series = {name: values for name, values in o.series.items() if isinstance(values, list) and len(values) > 1}
        if not series:
            continue
        figure = Figure(figsize=(8, 2.2 * len(series)), layout="constrained")
        for axis, (name, values) in zip(figure.subplots(len(series), squeeze=False)[:, 0], series.items(), strict=True):
            axis.plot(values, linewidth=1)
            axis.set_title(name, fontsize=9)
            axis.set_ylim(bottom=0)
        figure.savefig(out.with_name(f"{out.stem}-{o.part}.svg"))


if __name__ == "__main__":
    main()
