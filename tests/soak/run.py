"""All of the soak at full length: `make soak`, or `python tests/soak/run.py`.

    python tests/soak/run.py --parts crashes damage --out build/soak.json
    python tests/soak/run.py --report build/soak.json

Writes figures and series as JSON after every part, plots beside it, prints a table last, and ends with 1 if anything happened
that must not. With --report it runs nothing, and makes plots and table from such a file. docs/reliability.md says what each part
does.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "store"), str(HERE.parent.parent / "benchmarks")]

import soak_bounds
import soak_cancel
import soak_crashes
import soak_damage
import soak_faults
import soak_forks
import soak_load
import soak_planted
import soak_remote
import soak_report
import soak_shared
import soak_signals
import torch
from common import environment
from soak_common import Outcome

PARTS: dict[str, Callable[[Path], Outcome]] = {
    "crashes": lambda folder: soak_crashes.run(folder, kills=200, every=5),
    "damage": lambda folder: soak_damage.run(folder, examples=1000),
    "faults": lambda folder: soak_faults.run(folder),
    "shared": lambda folder: soak_shared.run(folder, rounds=20),
    "load": lambda folder: soak_load.run(folder, seconds=600, processes=8, threads=4),
    "bounds": lambda folder: soak_bounds.run(folder, requests=10_000, budget_mib=64),
    "forks": lambda folder: soak_forks.run(folder, forks=500),
    "remote": lambda folder: soak_remote.run(folder, kills=50),
    "planted": lambda folder: soak_planted.run(folder, rounds=150),
    "signals": lambda folder: soak_signals.run(folder, rounds=5),
    "cancel": lambda folder: soak_cancel.run(folder, interrupts=1000, cancels=10),
}


OUT = HERE.parent.parent / "build" / "soak.json"


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--parts", nargs="+", choices=sorted(PARTS), default=list(PARTS))
    parser.add_argument("--out", type=Path, default=OUT, help="file for the JSON (default: build/soak.json)")
    parser.add_argument("--plot", type=Path, help="where plots go, without -PART.svg (default: beside the JSON)")
    parser.add_argument("--report", type=Path, metavar="JSON", help="run nothing; plots and table of this file")
    args = parser.parse_args()
    if args.report is not None:
        outcomes, out = soak_report.read(args.report), args.report
    else:
        torch.set_num_threads(1)  # workers are forked, and many at once
        outcomes, out, where = [], args.out, environment()
        for name in args.parts:
            outcomes.append(run(name))
            soak_report.write(outcomes, where, out)
    made = soak_report.plot(outcomes, args.plot or out.with_suffix(""))
    print(f"{', '.join(map(str, [out, *made]))}\n", file=sys.stderr, flush=True)
    print(soak_report.table(outcomes))
    sys.exit(any(o.problems for o in outcomes))


def run(name: str) -> Outcome:
    """One part, in a folder of its own; one that breaks off is a problem, and the next ones run."""
    print(f"{name} ...", file=sys.stderr, flush=True)
    started = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory() as folder:
            outcome = PARTS[name](Path(folder))
    except Exception:
        outcome = Outcome(name, problems=[traceback.format_exc()])
    outcome.seconds = time.perf_counter() - started
    for problem in outcome.problems[:20]:
        print(f"{name}: {problem}", file=sys.stderr)
    return outcome


if __name__ == "__main__":
    main()
