"""How many right answers reuse keeps, on tasks with one right answer, by selector, ratio and codec; see docs/quality-tasks.md.

    python benchmarks/tasks.py --quick
    python benchmarks/tasks.py --device cuda --out benchmarks/results/tasks
    python benchmarks/tasks.py --report benchmarks/results/tasks

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

from fidelity.arguments import add_model, add_shards, finish
from fidelity.evaluate import Engines
from fidelity.forms import FORMS, PLAIN, check_chat
from fidelity.inputs import header_of, most_positions, open_model, refused
from fidelity.report import load
from fidelity.rows import RowFile
from fidelity.settings import LEAD_INS, compared_selectors
from tasks_of.evaluate import TaskRunner
from tasks_of.haystack import file_sentences, reference_sentences
from tasks_of.kinds import KINDS
from tasks_of.layout import PLACES
from tasks_of.prompts import CHUNK_TOKENS, LENGTHS, NEAR_DUPLICATES, Cell, TaskMaker
from tasks_of.references import BFLOAT16, OTHER_ORDER, REFERENCES, rounded_model
from tasks_of.report import markdown
from tasks_of.settings import RATIOS, SELECTORS, compared

from cachetune_rag.reuse.config import AUTO
from cachetune_store import codec_names

QUICK = {
    "lengths": [1024],
    "near_duplicates": ["without"],
    "prompts": 2,
    "ratios": [0.05, 0.15],
    "selectors": list(dict.fromkeys((AUTO.selector, "frequency"))),
}
"""Settings of a small run. Its figures mean little, but every kind of prompt runs."""

GROUP = 8
"""How many prompts a GPU measures together."""
GROUP_TOKENS = 16384
"""About the most tokens of prompts that are measured together, and the most that run together while chunks are computed."""


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, or report what was measured."""
    started = time.monotonic()
    args = arguments(argv)
    if args.report is not None:
        report(args.report)
        return
    model, tokenizer = open_model(args)
    check_context(model, args.lengths)
    refused(check_chat, tokenizer, args.forms)
    maker = TaskMaker(tokenizer, prose(args.prose), args.chunk_tokens, args.places, args.seed)
    check_prompts(maker, args)
    settings = compared(args.selectors, args.ratios, args.lead_ins, args.codecs, args.references)
    header = header_of("tasks", args, model, prose=maker.haystack.digest, lead_ins=maker.dataset.digest)
    on_gpu = model.device.type == "cuda"
    args.group = args.group or (GROUP if on_gpu else 1)
    options = {"cuda_kernels": args.cuda_kernels, "host_budget": args.host_budget}
    engines = Engines(model, tokenizer, batch_tokens=GROUP_TOKENS if on_gpu else None, **options)
    rounded = Engines(rounded_model(model), tokenizer, **options) if BFLOAT16 in settings else None
    with closing(RowFile(args.out, args.shard, args.shards, header)) as rows, closing(engines):
        measure(TaskRunner(engines, maker, settings, args.together, rounded), maker, rows, started, args)
    if rounded is not None:
        rounded.close()
    if args.shards == 1:
        report(args.out)


def measure(runner: TaskRunner, maker: TaskMaker, rows: RowFile, started: float, args: argparse.Namespace) -> None:
    """Run this process's share of the prompts, until they are done or the time is over."""
    work = groups(cells_of(args), numbers_of(args), args.group)[args.shard :: args.shards]
    for done, (cell, numbers) in enumerate(work, start=1):
        added, begun = 0, time.perf_counter()
        tasks = [maker.task(cell, number) for number in numbers]
        for row in runner.run(tasks, rows.known):
            rows.add(row)
            added += 1
        took = time.perf_counter() - begun
        names = tasks[0].name + (f" to {tasks[-1].name}" if len(tasks) > 1 else "")
        print(f"{done}/{len(work)} {names}: {added} rows, {took:.1f} s", file=sys.stderr, flush=True)
        if done < len(work) and time.monotonic() - started > args.seconds:
            print(f"{args.seconds:g} s are over; the same command goes on from here", file=sys.stderr, flush=True)
            return


def cells_of(args: argparse.Namespace) -> list[Cell]:
    """The cells that the arguments ask for."""
    return [
        Cell(kind, length, near, form)
        for length in args.lengths
        for near in args.near_duplicates
        for form in args.forms
        for kind in args.kinds
    ]


def numbers_of(args: argparse.Namespace) -> range:
    """The numbers of each cell's prompts."""
    return range(args.first, args.first + args.prompts)


def check_prompts(maker: TaskMaker, args: argparse.Namespace) -> None:
    """Refuse prompts that can't be made, before anything is measured: each is made once, which takes some milliseconds."""
    for cell in cells_of(args):
        for number in numbers_of(args):
            refused(maker.task, cell, number, what=f"prompt {number} of {cell}: ")


def groups(cells: Sequence[Cell], numbers: range, most: int) -> list[tuple[Cell, range]]:
    """The prompts of these numbers of every cell, in groups of up to so many of one cell. Those of long prompts are smaller.

    The cells take turns, so that a run that is cut off has results for each, and each process of several gets some of each.
    """
    made = []
    for turn, start in enumerate(numbers[::most]):
        first = turn % len(cells)
        for cell in (*cells[first:], *cells[:first]):
            size = max(1, min(most, GROUP_TOKENS // cell.length))
            block = range(start, min(start + most, numbers.stop))
            made += [(cell, block[at : at + size]) for at in range(0, len(block), size)]
    return made


def prose(files: Sequence[Path]) -> list[str]:
    """The sentences that facts are planted in."""
    return file_sentences(files) if files else reference_sentences()


def check_context(model: Any, lengths: Sequence[int]) -> None:
    """Refuse prompts that are longer than what the model reads."""
    most = most_positions(model)
    if most is not None and max(lengths) > most:
        sys.exit(f"--lengths has {max(lengths)}, and this model reads at most {most} tokens: leave longer ones out.")


def report(folder: Path) -> None:
    """Write table.md into the folder of the results."""
    text = markdown(*load(folder))
    (folder / "table.md").write_text(text)
    print(text)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. --quick changes defaults only, so other options may be given with it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="a few prompts and settings: minutes on two cores")
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="only make the tables of these results")
    parser.add_argument("--out", type=Path, help="folder for the results (default: one of this commit in build/)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so many; start again to go on")
    add_model(parser)
    parser.add_argument("--host-budget", default="8GiB", help="memory for one prompt's chunks")
    parser.add_argument("--together", type=int, default=6, help="for how many settings answers are decoded together")
    parser.add_argument(
        "--group",
        type=int,
        help=f"how many prompts of a cell are measured together (default: {GROUP} on a GPU, else 1)",
    )
    data = parser.add_argument_group("prompts")
    data.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    data.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS), help="tokens of prompt and answer")
    data.add_argument("--near-duplicates", nargs="+", default=list(NEAR_DUPLICATES), choices=NEAR_DUPLICATES)
    data.add_argument("--forms", nargs="+", default=[PLAIN], choices=list(FORMS), help="in which users have chunks")
    data.add_argument("--prose", type=Path, nargs="+", default=[], metavar="FILE", help="other prose, of any language")
    data.add_argument("--chunk-tokens", type=int, nargs="+", default=list(CHUNK_TOKENS), help="most tokens of a chunk")
    data.add_argument("--places", nargs="+", default=list(PLACES), choices=PLACES, help="of the needed facts")
    data.add_argument("--prompts", type=int, default=100, help="of each cell (kind, length, near-duplicates)")
    data.add_argument("--first", type=int, default=0, help="number of each cell's first prompt")
    data.add_argument("--seed", type=int, default=0)
    grid = parser.add_argument_group("settings, beside full prefill and reuse without recompute")
    grid.add_argument("--selectors", nargs="+", default=list(SELECTORS), choices=compared_selectors())
    grid.add_argument("--ratios", type=float, nargs="+", default=list(RATIOS))
    grid.add_argument("--lead-ins", nargs="+", default=["auto"], choices=LEAD_INS)
    grid.add_argument("--codecs", nargs="+", default=["exact"], choices=codec_names())
    grid.add_argument(
        "--references", nargs="+", default=[], choices=list(REFERENCES), help="full prefill once more: what it keeps"
    )
    add_shards(parser)
    if parser.parse_known_args(argv)[0].quick:
        parser.set_defaults(**QUICK)
    args = parser.parse_args(argv)
    finish(parser, args, "tasks")
    if OTHER_ORDER.selector in args.references and args.forms != [PLAIN]:
        parser.error(f"--references {OTHER_ORDER.selector} takes --forms {PLAIN} alone, not {' '.join(args.forms)}.")
    for name in ("prompts", "together", "group"):
        if (given := getattr(args, name)) is not None and given < 1:
            parser.error(f"--{name} is {given}: use 1 or more.")
    return args


if __name__ == "__main__":
    main()
