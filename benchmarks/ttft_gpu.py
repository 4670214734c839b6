"""Time to first token on a GPU, of a random model of a real model's shape; see docs/performance.md.

    python benchmarks/ttft_gpu.py --seconds 420 --out benchmarks/results/ttft-h100.json

There is one process with one model, and the most important figures come first. The file is written after every round. If a run was cut
off, the same command continues it. `speed_report.py` makes tables and plots of the file.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from pathlib import Path

from common import environment
from speed.machine import copy_speed, disk_speed, driver
from speed.plan import PHASES, SELECTORS, groups
from speed.results import Results
from speed.run import Run
from speed.shapes import SHAPES
from speed.subject import Subject


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    started = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3.1-8b")
    parser.add_argument(
        "--contexts", type=int, nargs="+", default=[4096, 8192, 16384, 32768], help="chunk tokens of a prompt"
    )
    parser.add_argument("--chunk-tokens", type=int, default=512)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.05, 0.15])
    parser.add_argument("--selectors", nargs="+", default=list(SELECTORS), help="where a phase names none")
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES), help="always in this order")
    parser.add_argument(
        "--stored", type=float, default=1.0, help="share of a prompt's chunks that are reused; the others are new text"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--full-rounds", type=int, help="rounds of full prefill, where it takes long (default: all)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="from the start; begins nothing after that")
    parser.add_argument("--lead-in", choices=["auto", "first_token"], default="auto")
    parser.add_argument("--plain", action="store_true", help="without the package's kernels")
    parser.add_argument("--no-warmup", action="store_true", help="leave the model's layers as they are, not compiled")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--folder", type=Path, help="where the store goes: on the disk to be measured")
    parser.add_argument("--commit", help="what to record where there is no git")
    parser.add_argument("--trace", type=Path, help="file for the profiler's trace (.json.gz) of the phase timeline")
    parser.add_argument("--out", type=Path, help="file for the JSON")
    args = parser.parse_args(arguments)
    if not 0 < args.stored <= 1:
        parser.error(f"--stored is {args.stored}: use a number above 0 and at most 1.")

    env = environment() | ({"commit": args.commit} if args.commit else {}) | {"driver": driver()}
    settings = {
        k: getattr(args, k) for k in ("shape", "chunk_tokens", "rounds", "lead_in", "plain", "no_warmup", "device")
    }
    if args.stored != 1:
        settings["stored"] = args.stored
    results = Results(args.out, env, settings)
    wanted = groups(args.phases, args.contexts, args.ratios, args.selectors)
    if not wanted:
        parser.error(f"phases {args.phases} measure nothing at contexts {args.contexts}: kvboost goes up to 16384")
    on_disk = any(group.tier != "host" for group in wanted)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        machine = results.content["machine"]
        machine["copy_bytes_per_second"] = copy_speed(args.device)
        if on_disk:
            machine["disk_bytes_per_second"], machine["disk_direct"] = disk_speed(Path(folder))
        store = Path(folder) / "kv" if on_disk else None
        with Subject(
            args.shape, args.device, store, args.contexts, args.chunk_tokens, args.lead_in, not args.plain, args.stored
        ) as subject:
            if wanted[0].settings:
                # Before the warm-up, because lead-ins are chosen here, and the warm-up depends on them.
                subject.store(wanted[0].codec, "host")
            if not args.no_warmup:
                subject.warmup()
            # A full pass of the garbage collector takes longer than a request; docs/gpu.md advises servers to do this.
            gc.collect()
            gc.freeze()
            machine["attention"] = subject.attention[0]
            print(f"ready after {time.perf_counter() - started:.1f} s: {machine}", flush=True)
            run = Run(
                subject, results, args.rounds, args.full_rounds, started + args.seconds, args.trace,
                lambda text: print(text, flush=True),
            )  # fmt: skip
            run.groups(wanted)
    print(f"done after {time.perf_counter() - started:.1f} s", flush=True)


if __name__ == "__main__":
    main()
