"""How well cheap signs of a request predict how far reuse is from full prefill, and what bounds by them keep; see docs/quality.md.

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
from typing import Any

import torch
from common import environment
from fidelity.arguments import add_model, add_shards, finish
from fidelity.bounds import markdown
from fidelity.documents import Shape, read_documents
from fidelity.evaluate import Engines
from fidelity.musique import read_musique
from fidelity.records import Dataset
from fidelity.report import load
from fidelity.rows import RowFile
from fidelity.signs import TOKENS, NotingSelector, SignStudy
from fidelity.sources import folder_sources, installed_sources
from smollm2 import model_path

from cachetune_rag.model.loaded.fingerprint import model_fingerprint
from cachetune_rag.model.loading import load_model
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
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.tf32
    model, tokenizer = load_model(
        args.model or model_path(), gguf_file=args.gguf_file, device=args.device, dtype=args.dtype
    )
    sets = datasets(args, tokenizer)
    header = {
        "benchmark": "bound",
        "model": args.name or Path(model.config.name_or_path).name,
        "weights": model_fingerprint(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "tf32": args.tf32,
        "device": model.device.type,
        "cuda_kernels": args.cuda_kernels,
        "tokens": TOKENS,
        "seed": args.seed,
        "sets": {d.name: d.digest for d in sets},
        "commit": args.commit or environment()["commit"],
        "environment": environment(),
    }
    selector = get_selector(args.selector)
    assert isinstance(selector, ProbingSelector)
    noting = NotingSelector(selector)
    register_selector(noting)
    engines = Engines(model, tokenizer, cuda_kernels=args.cuda_kernels, host_budget=args.host_budget)
    with closing(RowFile(args.out, args.shard, args.shards, header)) as rows, closing(engines):
        studies = [SignStudy(engines, d, noting, args.selector, args.ratios) for d in sets]
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
            if time.monotonic() - started > args.seconds:
                print(f"{args.seconds:g} s are over; the same command goes on from here", file=sys.stderr, flush=True)
                return


def report(folder: Path) -> None:
    """Write table.md into the folder of the results."""
    text = markdown(*load(folder))
    (folder / "table.md").write_text(text)
    print(text)


def datasets(args: argparse.Namespace, tokenizer: Any) -> list[Dataset]:
    """The sets of records that the arguments ask for. MuSiQue is one of them where its file is given."""
    sets = []
    if args.musique is not None:
        sets.append(read_musique(args.musique, tokenizer, args.first, args.musique_records, args.passages))
    if args.documents:
        sources = ({} if args.docs_only else installed_sources()) | dict(folder_sources(args.docs))
        shape = Shape(args.chunks, args.chunk_tokens)
        sets.append(read_documents(sources, tokenizer, shape, args.first, args.documents, args.seed))
    return sets


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. --quick changes defaults only, so other options may be given with it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="a few records and ratios: a minute or two on two cores")
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="only make the tables of these results")
    parser.add_argument("--out", type=Path, help="folder for the results (default: one of this commit in build/)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so many; start again to go on")
    add_model(parser)
    parser.add_argument("--host-budget", default="8GiB", help="memory for one record's chunks")
    data = parser.add_argument_group("records")
    data.add_argument("--musique", type=Path, metavar="FILE", help="questions as JSON lines, plain or gzipped")
    data.add_argument(
        "--docs", type=Path, nargs="+", default=[], metavar="FOLDER", help="more documents, a source each"
    )
    data.add_argument("--docs-only", action="store_true", help="not those that come with Python and its packages")
    data.add_argument("--first", type=int, default=0, help="first record of each set")
    data.add_argument("--musique-records", type=int, default=70)
    data.add_argument("--passages", type=int, help="of a question, the first so many (default: all)")
    data.add_argument("--documents", type=int, default=70, help="records of documents, 0 for none")
    data.add_argument("--chunks", type=int, default=8)
    data.add_argument("--chunk-tokens", type=int, default=512)
    data.add_argument("--seed", type=int, default=0)
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
