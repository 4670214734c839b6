"""How close reuse is to full prefill on real text, by selector, ratio, lead-in and codec; see docs/quality.md.

    python benchmarks/quality.py --quick
    python benchmarks/quality.py --musique musique_ans_v1.0_dev.jsonl --out benchmarks/results/quality
    python benchmarks/quality.py --forms plain overlapping twice tables --out benchmarks/results/quality-forms
    python benchmarks/quality.py --report benchmarks/results/quality

A run that was cut off continues when it is started again with the same arguments.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from fidelity.answers import ANSWER_TOKENS
from fidelity.answers_report import by_answers
from fidelity.arguments import add_model, add_shards, finish
from fidelity.evaluate import Engines, Evaluator
from fidelity.forms_report import by_form
from fidelity.inputs import (
    add_forms,
    add_records,
    check_forms,
    check_lengths,
    header_of,
    open_model,
    read_sets_in_forms,
    refused,
)
from fidelity.orders import mean_of_orders, set_of
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


UNUSUAL: dict[str, Any] = {"stored": 1, "answer_tokens": ANSWER_TOKENS, "steps_end": None}
"""Arguments that rows depend on and that most runs don't give."""


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, or report what was measured."""
    started = time.monotonic()
    args = arguments(argv)
    if args.report is not None:
        report(args.report)
        return
    model, tokenizer = open_model(args)
    sets = refused(read_sets_in_forms, args, tokenizer)
    refused(check_lengths, sets, tokenizer, model, args.answer_tokens if args.answers else 0)
    settings = grid(args.selectors, args.ratios, args.lead_ins, args.codecs)
    if args.together is None:
        args.together = 6 if model.device.type == "cuda" else 1
    answer_ratios = args.answer_ratios if args.answers else []
    # Only what is asked for, so that folders from before these options existed can be gone on with.
    more = {name: getattr(args, name) for name, usual in UNUSUAL.items() if getattr(args, name) != usual}
    header = header_of("quality", args, model, answer_ratios=answer_ratios, sets=digests(sets), **more)
    engines = Engines(model, tokenizer, cuda_kernels=args.cuda_kernels, host_budget=args.host_budget)
    with closing(RowFile(args.out, args.shard, args.shards, header)) as rows, closing(engines):
        options = (answer_ratios, args.together, args.stored, args.answer_tokens, args.steps_end)
        made = [Evaluator(engines, d, settings, *options) for d in sets]
        measure(made, sets, rows, started, args)
    if args.shards == 1:
        report(args.out)


def measure(
    evaluators: Sequence[Evaluator], sets: Sequence[Dataset], rows: RowFile, started: float, args: argparse.Namespace
) -> None:
    """Run this process's share of the records, until they are done or the time is over."""
    work = in_turn([len(dataset.records) for dataset in sets])[args.shard :: args.shards]
    for done, (n, i) in enumerate(work, start=1):
        record, begun, added = sets[n].records[i], time.perf_counter(), 0
        for row in evaluators[n].run(record, rows.known):
            rows.add(row)
            added += 1
        name = f"{sets[n].name}, {record.form}, {record.name}"
        took = time.perf_counter() - begun
        print(f"{done}/{len(work)} {name}: {added} rows, {took:.1f} s", file=sys.stderr, flush=True)
        if done < len(work) and time.monotonic() - started > args.seconds:
            print(f"{args.seconds:g} s are over; the same command goes on from here", file=sys.stderr, flush=True)
            return


def in_turn(counts: Sequence[int]) -> list[tuple[int, int]]:
    """Every set and record by their numbers, for sets of so many records.

    The sets take turns, so that a run that is cut off has results for each. Another one begins each turn, so that each process of several
    gets some of each set.
    """
    turns = ((i, (i + n) % len(counts)) for i in range(max(counts, default=0)) for n in range(len(counts)))
    return [(n, i) for i, n in turns if i < counts[n]]


def digests(sets: Sequence[Dataset]) -> dict[str, str | list[str]]:
    """What the records of each set have in common. Forms with text of their own have a digest each; other orders have the set's."""
    found = {set_of(d.name): sorted({other.digest for other in sets if other.name == d.name}) for d in sets}
    return {name: each[0] if len(each) == 1 else each for name, each in found.items()}


def report(folder: Path) -> None:
    """Write table.md and, if there is matplotlib, shares.svg into the folder of the results."""
    header, rows = load(folder)
    points = summarise([*rows, *mean_of_orders(rows)])
    text = "\n".join(filter(None, (markdown(header, points), by_answers(rows), by_form(rows))))
    (folder / "table.md").write_text(text)
    print(text)
    if not points:  # no chunks were plain
        return
    try:
        from fidelity.plot import plot

        plot(points, folder / "shares.svg", f"{header['model']}, {header['dtype']}")
    except ModuleNotFoundError as error:
        print(f"no plot: {error}. For one: pip install 'cachetune-rag[plot]'", file=sys.stderr)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. --quick changes defaults only, so other options may be given with it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="a few records and settings: minutes on two cores")
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="only make table and plot of these results")
    parser.add_argument("--out", type=Path, help="folder for the results (default: one of this commit in build/)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so many; start again to go on")
    add_model(parser)
    parser.add_argument("--host-budget", default="8GiB", help="memory for one record's chunks")
    parser.add_argument(
        "--together", type=int, help="settings whose targets are computed in one forward (default: 6 on a GPU, else 1)"
    )
    data = add_records(parser, 40)
    add_forms(data)
    data.add_argument(
        "--query", default="{}", help="what stands behind the passages, {} for the question (default: it alone)"
    )
    data.add_argument(
        "--orders", type=int, default=1, help="in how many orders of its passages each question is asked (default: 1)"
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
    grid_.add_argument("--answer-tokens", type=int, default=ANSWER_TOKENS, help="most tokens of an answer")
    grid_.add_argument(
        "--steps-end",
        metavar="MARK",
        help="score what stands behind an answer's last MARK, where a model tells steps before it (default: all of it)",
    )
    add_shards(parser)
    if parser.parse_known_args(argv)[0].quick:
        parser.set_defaults(**QUICK)
    args = parser.parse_args(argv)
    finish(parser, args, "quality")
    check_forms(parser, args)
    if not 0 <= args.stored <= 1:
        parser.error(f"--stored is {args.stored}: use a number from 0 to 1.")
    if args.answer_tokens < 1:
        parser.error(f"--answer-tokens is {args.answer_tokens}: use 1 or more.")
    if args.steps_end is not None and not args.steps_end.strip():
        parser.error(f"--steps-end is {args.steps_end!r}: use a mark that stands behind the steps, such as ';'.")
    if not args.answers and (args.answer_tokens, args.steps_end) != (ANSWER_TOKENS, None):
        parser.error("--answer-tokens and --steps-end are of answers: ask for them by --answers, or leave these out.")
    if args.orders > 1 and args.musique is None:
        parser.error(
            f"--orders is {args.orders}, and passages of questions alone are put in other orders: give --musique, or leave it out."
        )
    if args.orders < 1:
        parser.error(f"--orders is {args.orders}: use 1 or more.")
    if "{}" not in args.query:
        parser.error(f"--query is {args.query!r}: it needs {{}} where the question goes.")
    return args


if __name__ == "__main__":
    main()
