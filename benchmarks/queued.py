"""Two queued requests compared with one, where all chunks are on disk at first and the page cache isn't used.

    python benchmarks/queued.py --out benchmarks/results/queued-cpu.json

Every round times three ways in turn, in one process: one request alone; two with `generate_many`, which reads the second one's chunks while
the first one computes; and the same two with `generate`, one after the other. Medians are compared. Before each way, the chunks are
removed from host memory. Seconds count from the first call to the last token.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import environment, spread, write_json
from subjects import add_arguments, load, passages

from cachetune_rag import CacheTune

QUERY = "What does the text say about the order in which expressions are evaluated?"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    add_arguments(parser)
    parser.add_argument("--codec", default="exact")
    parser.add_argument("--selector", default="auto")
    parser.add_argument("--ratio", default="auto", help="a number, or auto")
    parser.add_argument(
        "--tune", action="store_true", help="tune the disk tier for these prompts first (with --ratio auto)"
    )
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the store goes: on the disk to be measured")
    parser.add_argument("--commit", help="what to record where there is no git")
    parser.add_argument("--out", type=Path, help="file for the JSON (default: standard output)")
    args = parser.parse_args()

    model, tokenizer = load(args)
    first, second = passages(args, tokenizer, 2)
    with (
        tempfile.TemporaryDirectory(dir=args.folder) as folder,
        CacheTune(
            model, tokenizer, Path(folder) / "kv", codec=args.codec, host_budget="64GiB", direct_io=True
        ) as engine,
    ):
        engine.precompute([*first, *second])
        tuned = None
        if args.tune:
            samples = [{"query": QUERY, "chunks": chunks} for chunks in (first, second)]
            tuned = engine.tune(samples, tier="disk", selector=args.selector).as_dict()
        engine.warmup()
        result = measure(engine, first, second, args)
    env = environment() | ({"commit": args.commit} if args.commit else {})
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in ("out", "commit")}
    write_json(args.out, {"benchmark": "queued", "environment": env, "settings": settings, "tuned": tuned, **result})
    print(table(result), file=sys.stderr)


def measure(engine: CacheTune, first: list[str], second: list[str], args: Any) -> dict[str, Any]:
    """Medians of the three ways, and their quotients."""
    ratio = args.ratio if args.ratio == "auto" else float(args.ratio)
    # All answers have the same length, so that all rounds do the same work.
    shared = {
        "ratio": ratio,
        "selector": args.selector,
        "max_new_tokens": args.new_tokens,
        "min_new_tokens": args.new_tokens,
    }
    one, two = ({"query": QUERY, "chunks": chunks, **shared} for chunks in (first, second))
    ways = {
        "one": lambda: [engine.generate(**one)],
        "queued": lambda: list(engine.generate_many([one, two])),
        "sequential": lambda: [engine.generate(**one), engine.generate(**two)],
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    firsts: dict[str, list[float]] = {name: [] for name in ways}
    reports: dict[str, list[Any]] = {}
    for round_ in range(args.rounds + 1):
        for name, work in ways.items():
            empty_host_memory(engine, [*first, *second])
            started = time.perf_counter()
            answers = work()
            took = time.perf_counter() - started
            assert all(a.report.missed == 0 and len(a.token_ids) == args.new_tokens for a in answers), answers
            reports[name] = [a.report.as_dict() for a in answers]
            if round_:  # the first round warms up
                times[name].append(took)
                firsts[name].append(answers[-1].report.ttft)
    median = {name: statistics.median(samples) for name, samples in times.items()}
    return {
        "seconds": {name: spread(samples) for name, samples in times.items()},
        "last_ttft": {name: spread(samples) for name, samples in firsts.items()},
        "queued_over_one": median["queued"] / median["one"],
        "sequential_over_one": median["sequential"] / median["one"],
        "reports": reports,
    }


def empty_host_memory(engine: CacheTune, chunks: list[str]) -> None:
    """Remove the chunks from host memory, so that only the disk has them."""
    keys = [engine.runtime.assembler.key(engine.prompts.encode(text)) for text in chunks]
    for reader in engine.runtime.prefetcher.take(keys).values():
        reader.close()
    for key in keys:
        engine.store.tier("host").remove(key)


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    lines = ["| | seconds | first token of the last request, s | over one |", "| --- | --- | --- | --- |"]
    one = result["seconds"]["one"]["median"]
    for name, found in result["seconds"].items():
        ttft = result["last_ttft"][name]["median"]
        lines.append(f"| {name} | {found['median']:.3f} | {ttft:.3f} | {found['median'] / one:.2f}x |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
