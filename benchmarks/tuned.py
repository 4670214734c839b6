"""The tuned setting compared with fixed ratios on each tier, all in one run.

    python benchmarks/tuned.py --out benchmarks/results/tuned-cpu.json --plot benchmarks/results/tuned-cpu.svg

First the engine is tuned. Then every round times the tuned setting, the fixed ratios and full prefill in turn, and medians are compared, so
that the times from tuning itself don't count. With a fixed ratio no rows are skipped but those that the selector doesn't read anyway.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import environment, spread, write_json
from subjects import add_arguments, load, passages

from cachetune_rag import CacheTune
from cachetune_rag.measuring.tuning import TierTuning
from cachetune_rag.measuring.tuning.measure import TierMeasure

QUERY = "What does the text say about the order in which expressions are evaluated?"


def main() -> None:
    """Tune, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    add_arguments(parser)
    parser.add_argument("--codecs", nargs="+", default=["exact"])
    parser.add_argument("--selectors", nargs="+", default=["auto", "frequency"])
    parser.add_argument("--tier", default="auto")
    parser.add_argument("--fixed", type=float, nargs="+", default=[0.15, 0.3, 0.5, 0.7])
    parser.add_argument("--r-min", type=float, help="least ratio (default: 0.15)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the store goes: on the disk to be measured")
    parser.add_argument("--commit", help="what to record where there is no git")
    parser.add_argument(
        "--plot", type=Path, help="file for plots of the searches; codec and selector are added to its name"
    )
    parser.add_argument("--out", type=Path, help="file for the JSON (default: standard output)")
    args = parser.parse_args()

    model, tokenizer = load(args)
    chunks = passages(args, tokenizer, 1)[0]
    rows: list[dict[str, Any]] = []
    for codec in args.codecs:
        with (
            tempfile.TemporaryDirectory(dir=args.folder) as folder,
            CacheTune(model, tokenizer, Path(folder) / "kv", codec=codec, host_budget="64GiB") as engine,
        ):
            engine.precompute(chunks)
            engine.warmup()
            sample = {"query": QUERY, "chunks": chunks}
            for selector in args.selectors:
                found = engine.tune(
                    [sample], tier=args.tier, selector=selector, r_min=args.r_min,
                    progress=lambda p: print(f"{p.tier} {p.point.ratio:g}: {p.point.ttft * 1e3:.1f} ms", file=sys.stderr),
                )  # fmt: skip
                if args.plot is not None:
                    from cachetune_rag.cli.plots import draw_tuning, save_plot

                    name = f"{args.plot.stem}-{codec}-{found.tiers[0].selector}{args.plot.suffix}"
                    save_plot(draw_tuning(found), args.plot.with_name(name))
                for tuning in found.tiers:
                    rows.append(compare(engine, sample, tuning, args))
                    print(line(rows[-1]), file=sys.stderr, flush=True)
    env = environment() | ({"commit": args.commit} if args.commit else {})
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in ("out", "commit")}
    write_json(args.out, {"benchmark": "tuned", "environment": env, "settings": settings, "rows": rows})


def compare(engine: CacheTune, sample: dict[str, Any], tuning: TierTuning, args: Any) -> dict[str, Any]:
    """Medians of the tuned setting, the fixed ratios and full prefill, timed in turn."""
    prompt = engine.prompts.build(**sample)
    settings = {"tuned": (tuning.ratio, tuning.skipped), **{f"{r:g}": (r, 0.0) for r in args.fixed}}
    times: dict[str, list[float]] = {name: [] for name in ["full", *settings]}
    with TierMeasure(engine.runtime.bench(), [prompt], tuning.tier, tuning.selector) as measure:
        for setting in settings.values():
            measure.ready(*setting)
        for _ in range(args.rounds):
            times["full"] += measure.full(1)
            for name, setting in settings.items():
                times[name].append(measure.ttft(*setting))
    base = statistics.median(times["full"])
    return {
        "tier": tuning.tier,
        "codec": tuning.codec,
        "selector": tuning.selector,
        "prompt_tokens": len(prompt.ids),
        "ttft": {name: spread(samples) for name, samples in times.items()},
        "speedup": {name: base / statistics.median(samples) for name, samples in times.items()},
        "beats_all": all(statistics.median(times["tuned"]) < statistics.median(times[f"{r:g}"]) for r in args.fixed),
        "tuning": tuning.as_dict(),
    }


def line(row: dict[str, Any]) -> str:
    """One row as text."""
    found = ", ".join(
        f"{name} {t['median'] * 1e3:.1f} ms ({row['speedup'][name]:.2f}x)" for name, t in row["ttft"].items()
    )
    chosen = row["tuning"]
    return (
        f"{row['tier']} {row['codec']} {row['selector']}: r {chosen['ratio']:g}, skipped {chosen['skipped']:g}, balance "
        f"{chosen['warm_start']:.2f}; {found}"
    )


if __name__ == "__main__":
    main()
