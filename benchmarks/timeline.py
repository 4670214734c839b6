"""Where one request's time goes on a GPU: how much is copied while it computes, and when nothing computes; with a trace.

    python benchmarks/timeline.py --context 16384 --selector frequency --ratio 0.15 --trace timeline.json.gz

The model has a real model's shape and random weights; its chunks are in host memory. `ttft_gpu.py --trace` does the same in a longer run.
Open the trace in chrome://tracing or ui.perfetto.dev. The profiler slows down the host, not the device, so real gaps are at most as long.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from common import environment, write_json
from speed.machine import driver
from speed.shapes import SHAPES
from speed.subject import Subject
from speed.timeline import profile, summary

from cachetune_rag.reuse.config import ReuseConfig


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3.1-8b")
    parser.add_argument("--context", type=int, default=16384, help="chunk tokens of the prompt")
    parser.add_argument("--chunk-tokens", type=int, default=512)
    parser.add_argument("--codec", default="exact")
    parser.add_argument("--selector", default="expected_error")
    parser.add_argument("--ratio", type=float, default=0.15)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--commit", help="what to record where there is no git")
    parser.add_argument("--trace", type=Path, help="file for the trace; gzipped if its name ends in .gz")
    parser.add_argument("--out", type=Path, help="file for the JSON (default: standard output)")
    args = parser.parse_args()

    config = ReuseConfig(args.selector, args.ratio)
    with Subject(args.shape, args.device, None, [args.context], args.chunk_tokens) as subject:
        subject.store(args.codec, "host")
        subject.warmup()

        def run() -> float:
            return subject.reuse("host", args.context, args.codec, config).ttft

        for _ in range(3):
            run()
        took = run()
        found = profile(run, args.trace)
    env = environment() | ({"commit": args.commit} if args.commit else {}) | {"driver": driver()}
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "trace", "commit")}
    write_json(args.out, {"benchmark": "timeline", "environment": env, "settings": settings, "ttft": took, **found})
    print(f"{took * 1e3:.1f} ms without the profiler; with it {summary(found)}", file=sys.stderr)


if __name__ == "__main__":
    main()
