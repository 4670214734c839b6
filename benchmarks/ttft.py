"""Time to first token with reuse and with full prefill, measured in one run.

    python benchmarks/ttft.py --out benchmarks/results/ttft-cpu.json

Every round times full prefill and each setting once, in turn, so that a machine that becomes slower affects all alike. Medians of the
rounds are compared. The bound beside each speed-up is prompt tokens / computed tokens, which is the most that computing only those tokens
can give. The disk tier is read with O_DIRECT and an empty host tier, so nothing is cached.

`--clock processor` counts the time that the processor works for this program, on all threads together, in place of the time that passes. Where others use the machine it says what a
quiet one takes, if torch has one thread (OMP_NUM_THREADS=1); what waits for a disk doesn't count then.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import environment, real_chunks, spread, write_json
from smollm2 import model_path

from cachetune_rag import CacheTune
from cachetune_rag.model.loading import load_model

QUERY = "What does the text say about the order in which expressions are evaluated?"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", type=Path, help="folder of a model (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--chunk-tokens", type=int, default=256)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.05, 0.15])
    parser.add_argument(
        "--selectors", nargs="+", default=["expected_error", "expected_error_early", "probe", "frequency"]
    )
    parser.add_argument("--tiers", nargs="+", choices=["host", "disk"], default=["host", "disk"])
    parser.add_argument("--codec", default="exact")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--clock", choices=["wall", "processor"], default="wall")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", type=Path, help="file for the JSON (default: standard output)")
    args = parser.parse_args()

    if args.clock == "processor":
        time.perf_counter = time.process_time  # what reports take their times by

    model, tokenizer = load_model(args.model or model_path(), device=args.device, dtype=args.dtype)
    chunks = real_chunks(tokenizer, args.chunks, args.chunk_tokens)
    with tempfile.TemporaryDirectory() as folder:
        engines = {
            "host": CacheTune(model, tokenizer, None, codec=args.codec),
            "disk": CacheTune(model, tokenizer, Path(folder) / "kv", codec=args.codec, host_budget=0, direct_io=True),
        }
        engines = {tier: engines[tier] for tier in args.tiers}
        for engine in engines.values():
            engine.precompute(chunks)
        rows = measure(engines, chunks, args)
        for engine in engines.values():
            engine.close()
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k != "out"}
    write_json(args.out, {"benchmark": "ttft", "environment": environment(), "settings": settings, **rows})
    print(table(rows), file=sys.stderr)


def measure(engines: dict[str, CacheTune], chunks: list[str], args: Any) -> dict[str, Any]:
    """Medians of full prefill and of every (tier, selector, ratio)."""
    settings = [(t, s, r) for t in engines for s in args.selectors for r in args.ratios]
    first = next(iter(engines.values()))
    full_times: list[float] = []
    times: dict[Any, list[float]] = {key: [] for key in settings}
    reports: dict[Any, list[Any]] = {key: [] for key in settings}
    for round_ in range(args.rounds + 1):
        full = first.full_prefill(query=QUERY, chunks=chunks).report
        for tier, selector, ratio in settings:
            report = engines[tier].prefill(query=QUERY, chunks=chunks, ratio=ratio, selector=selector).report
            assert report.missed == 0, report
            if round_:
                reports[tier, selector, ratio].append(report)
                times[tier, selector, ratio].append(report.ttft)
        if round_:  # the first round warms up
            full_times.append(full.ttft)
    base = statistics.median(full_times)
    rows = []
    for key in settings:
        report, median = reports[key][-1], statistics.median(times[key])
        bound = report.prompt_tokens / report.computed
        rows.append(
            {
                "tier": key[0],
                "selector": key[1],
                "ratio": key[2],
                "computed": report.computed,
                "bytes_read": report.bytes_read,
                "ttft": spread(times[key]),
                "speedup": base / median,
                "bound": bound,
                "share_of_bound": base / median / bound,
                "timings": {
                    phase: statistics.median(r.timings[phase] for r in reports[key]) for phase in report.timings
                },
            }
        )
    return {"prompt_tokens": full.prompt_tokens, "full_prefill": spread(full_times), "rows": rows}


def table(result: dict[str, Any]) -> str:
    """The rows as text."""
    lines = [f"{result['prompt_tokens']} prompt tokens, full prefill {result['full_prefill']['median']:.3f} s"]
    lines.append("| tier | selector | r | computed | TTFT s | speed-up | bound | share |")
    lines.append("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for row in result["rows"]:
        lines.append(
            f"| {row['tier']} | {row['selector']} | {row['ratio']:g} | {row['computed']} | {row['ttft']['median']:.3f} "
            f"| {row['speedup']:.2f}x | {row['bound']:.2f}x | {row['share_of_bound']:.0%} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
