"""How well cheap signs of a request predict how far reuse is from full prefill, and what bounds by them keep; see docs/quality-bound.md.

    python benchmarks/bound.py --musique musique_ans_v1.0_dev.jsonl --out benchmarks/results/bound
    python benchmarks/bound.py --quick
    python benchmarks/bound.py --report benchmarks/results/bound

A run that was cut off continues when it is started again with the same arguments.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from fidelity import spending
from fidelity.arguments import add_model, add_shards, finish
from fidelity.bounds import markdown, requests_of
from fidelity.evaluate import Engines
from fidelity.inputs import add_records, header_of, open_model, read_sets
from fidelity.records import Dataset
from fidelity.report import load
from fidelity.rows import RowFile
from fidelity.signs import TOKENS, NotingSelector, SignStudy

from cachetune_rag.reuse.config import AUTO
from cachetune_rag.selection import get_selector, register_selector
from cachetune_rag.selection.probing import ProbingSelector

RATIOS = (0.02, 0.05, 0.10, 0.15, 0.30, 0.50)
QUICK = {"musique_records": 2, "passages": 2, "documents": 2, "chunks": 3, "chunk_tokens": 256, "ratios": [0.05, 0.15]}
"""Settings of a small run. Its figures mean little, but every part runs."""


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, or report what was measured."""
    started = time.monotonic()
    args = arguments(argv)
    if args.report is not None:
        report(args.report)
        return
    model, tokenizer = open_model(args)
    sets = read_sets(args, tokenizer)
    header = header_of("bound", args, model, tokens=TOKENS, sets={d.name: d.digest for d in sets})
    selector = get_selector(args.selector)
    assert isinstance(selector, ProbingSelector)
    noting = NotingSelector(selector)
    register_selector(noting)
    engines = Engines(model, tokenizer, cuda_kernels=args.cuda_kernels, host_budget=args.host_budget)
    with closing(RowFile(args.out, args.shard, args.shards, header)) as rows, closing(engines):
        measure([SignStudy(engines, d, noting, args.selector, args.ratios) for d in sets], sets, rows, started, args)
    if args.shards == 1:
        report(args.out)


def measure(
    studies: Sequence[SignStudy], sets: Sequence[Dataset], rows: RowFile, started: float, args: argparse.Namespace
) -> None:
    """Run this process's share of the records, until they are done or the time is over."""
    # The sets take turns, so that a run that is cut off has results for each.
    work = sorted((i, n) for n, d in enumerate(sets) for i in range(len(d.records)))[args.shard :: args.shards]
    for done, (i, n) in enumerate(work, start=1):
        begun, added = time.perf_counter(), 0
        for row in studies[n].run(sets[n].records[i], rows.known):
            rows.add(row)
            added += 1
        took = time.perf_counter() - begun
        name = f"{sets[n].name} {sets[n].records[i].name}"
        print(f"{done}/{len(work)} {name}: {added} rows, {took:.1f} s", file=sys.stderr, flush=True)
        if done < len(work) and time.monotonic() - started > args.seconds:
            print(f"{args.seconds:g} s are over; the same command goes on from here", file=sys.stderr, flush=True)
            return


def report(folder: Path) -> None:
    """Write table.md into the folder of the results."""
    header, rows = load(folder)
    text = markdown(header, rows) + spending.markdown(requests_of(rows))
    (folder / "table.md").write_text(text)
    print(text)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. --quick changes defaults only, so other options may be given with it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="a few records and ratios: a minute or two on two cores")
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="only make the tables of these results")
    parser.add_argument("--out", type=Path, help="folder for the results (default: one of this commit in build/)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so many; start again to go on")
    add_model(parser)
    parser.add_argument("--host-budget", default="8GiB", help="memory for one record's chunks")
    add_records(parser, 70)
    parser.add_argument("--selector", default=AUTO.selector, help="one with a probe")
    parser.add_argument("--ratios", type=float, nargs="+", default=list(RATIOS), help="beside 0")
    add_shards(parser)
    if parser.parse_known_args(argv)[0].quick:
        parser.set_defaults(**QUICK)
    args = parser.parse_args(argv)
    finish(parser, args, "bound")
    if not isinstance(get_selector(args.selector), ProbingSelector):
        parser.error(f"--selector is {args.selector}: use one with a probe, such as {AUTO.selector}.")
    return args


if __name__ == "__main__":
    main()
