"""How close reuse is to full prefill on real text, by selector, ratio, lead-in and codec; see docs/quality.md.

    python benchmarks/quality.py --quick
    python benchmarks/quality.py --musique musique_ans_v1.0_dev.jsonl --out benchmarks/results/quality
    python benchmarks/quality.py --report benchmarks/results/quality

A run that was cut off continues when it is started again with the same arguments.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from fidelity.arguments import add_model, add_shards, finish
from fidelity.documents import shuffled
from fidelity.evaluate import Engines, Evaluator
from fidelity.inputs import add_records, header_of, open_model, read_sets
from fidelity.records import Dataset
from fidelity.report import load, markdown, summarise
from fidelity.rows import RowFile
from fidelity.settings import LEAD_INS, RATIOS, compared_selectors, grid

from cachetune_rag.reuse.config import AUTO
from cachetune_store import codec_names

QUICK = {
    "musique_records": 1,
    "passages": 4,
    "documents": 2,
    "shuffled": 1,
    "chunks": 4,
    "chunk_tokens": 256,
    "ratios": [0.05, 0.15],
    "selectors": list(dict.fromkeys((AUTO.selector, "probe", "frequency"))),
    "codecs": ["exact"],
}
"""Settings of a small run. Its figures mean little, but every part of the benchmark runs."""


def main() -> None:
    """Measure, or report what was measured."""
    args = arguments()
    if args.report is not None:
        report(args.report)
        return
    model, tokenizer = open_model(args)
    sets = datasets(args, tokenizer)
    settings = grid(args.selectors, args.ratios, args.lead_ins, args.codecs)
    if args.together is None:
        args.together = 6 if model.device.type == "cuda" else 1
    answered = args.answer_ratios if args.answers else []
    more = {} if args.stored == 1 else {"stored": args.stored}
    header = header_of("quality", args, model, answer_ratios=answered, sets={d.name: d.digest for d in sets}, **more)
    rows = RowFile(args.out, args.shard, args.shards, header)
    options = {"cuda_kernels": args.cuda_kernels, "host_budget": args.host_budget}
    answer_ratios = args.answer_ratios if args.answers else ()
    engines = Engines(model, tokenizer, **options)
    evaluators = {d.name: Evaluator(engines, d, settings, answer_ratios, args.together, args.stored) for d in sets}
    try:
        # The sets take turns, so that a run that is cut off has results for each.
        work = sorted((i, n) for n, d in enumerate(sets) for i in range(len(d.records)))
        for number, (i, n) in enumerate(work[args.shard :: args.shards], start=1):
            dataset, record = sets[n], sets[n].records[i]
            started, added = time.perf_counter(), 0
            for row in evaluators[dataset.name].run(record, rows.known):
                rows.add(row)
                added += 1
            took = time.perf_counter() - started
            total = len(work[args.shard :: args.shards])
            print(
                f"{number}/{total} {dataset.name} {record.name}: {added} rows, {took:.1f} s",
                file=sys.stderr,
                flush=True,
            )
    finally:
        engines.close()
        rows.close()
    if args.shards == 1:
        report(args.out)


def datasets(args: argparse.Namespace, tokenizer: Any) -> list[Dataset]:
    """The sets of records that the arguments ask for; documents also with their chunks in another order."""
    sets = read_sets(args, tokenizer, args.query)
    if args.documents and args.shuffled:
        sets.append(shuffled(sets[-1], args.shuffled, args.seed))
    return sets


def report(folder: Path) -> None:
    """Write table.md and, if there is matplotlib, shares.svg into the folder of the results."""
    header, rows = load(folder)
    points = summarise(rows)
    text = markdown(header, points)
    (folder / "table.md").write_text(text)
    print(text)
    try:
        from fidelity.plot import plot

        plot(points, folder / "shares.svg", f"{header['model']}, {header['dtype']}")
    except ModuleNotFoundError as error:
        print(f"no plot: {error}. For one: pip install 'cachetune-rag[plot]'", file=sys.stderr)


def arguments() -> argparse.Namespace:
    """The command line. --quick changes defaults only, so other options may be given with it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="a few records and settings: minutes on two cores")
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="only make table and plot of these results")
    parser.add_argument("--out", type=Path, help="folder for the results (default: one of this commit in build/)")
    add_model(parser)
    parser.add_argument("--host-budget", default="8GiB", help="memory for one record's chunks")
    parser.add_argument(
        "--together", type=int, help="settings whose targets are computed in one forward (default: 6 on a GPU, else 1)"
    )
    data = add_records(parser, 40)
    data.add_argument(
        "--query", default="{}", help="what stands behind the passages, {} for the question (default: it alone)"
    )
    data.add_argument(
        "--shuffled", type=int, default=12, help="documents that are measured also with chunks in another order"
    )
    data.add_argument(
        "--stored",
        type=float,
        default=1.0,
        help="share of the chunks that are stored; the others are new text in the prompt",
    )
    grid_ = parser.add_argument_group("settings")
    grid_.add_argument("--selectors", nargs="+", default=compared_selectors(), choices=compared_selectors())
    grid_.add_argument("--ratios", type=float, nargs="+", default=list(RATIOS), help="beside 0 and 1")
    grid_.add_argument("--lead-ins", nargs="+", default=list(LEAD_INS), choices=LEAD_INS)
    grid_.add_argument("--codecs", nargs="+", default=list(codec_names()), choices=codec_names())
    grid_.add_argument("--answers", action="store_true", help="also let it answer the questions, and score the answers")
    grid_.add_argument("--answer-ratios", type=float, nargs="+", default=[0.0, 0.05, 0.15, 1.0])
    add_shards(parser)
    if parser.parse_known_args()[0].quick:
        parser.set_defaults(**QUICK)
    args = parser.parse_args()
    finish(parser, args, "quality")
    if not 0 <= args.stored <= 1:
        parser.error(f"--stored is {args.stored}: use a number from 0 to 1.")
    if "{}" not in args.query:
        parser.error(f"--query is {args.query!r}: it needs {{}} where the question goes.")
    return args


if __name__ == "__main__":
    main()
