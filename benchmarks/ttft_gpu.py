"""Time to first token on a GPU, on a random model of a real one's shape: context x tier x codec x selector x ratio.

    python benchmarks/ttft_gpu.py --out benchmarks/results/ttft-h100.json

Full prefill (transformers, its fastest attention here) and every setting are timed in turn in every round, in one process on
one card, and medians are compared. The floor beside each time is max(full prefill x share of tokens computed, bytes read /
copy speed of this machine): what neither cleverness nor overlap can beat. Texts are random letters under a byte-level
tokenizer, one token each; speed does not depend on what they say.
"""

from __future__ import annotations

import argparse
import random
import statistics
import string
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import ROOT, environment, spread, write_json
from timeline import describe, read
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config

from cachetune_rag import CacheTune

sys.path.insert(0, str(ROOT / "tests"))
from tiny import tokenizer

_COMMON = {"bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}
SHAPES: dict[str, PreTrainedConfig] = {
    "llama-3.1-8b": LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=131072, rms_norm_eps=1e-5, rope_theta=500000.0, **_COMMON,
    ),
    "qwen2.5-7b": Qwen2Config(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, max_position_embeddings=131072, rms_norm_eps=1e-6, rope_theta=1000000.0, **_COMMON,
    ),
    "mistral-7b": MistralConfig(
        vocab_size=32768, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=131072, sliding_window=None, **_COMMON,
    ),
    "tiny": LlamaConfig(
        vocab_size=261, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=131072, **_COMMON,
    ),
}  # fmt: skip
QUERY = "q" * 64


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3.1-8b")
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 8192, 16384, 32768])
    parser.add_argument("--chunk-tokens", type=int, default=512)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.05, 0.15])
    parser.add_argument("--selectors", nargs="+", default=["frequency", "expected_error"])
    parser.add_argument("--tiers", nargs="+", choices=["device", "host", "disk"], default=["host"])
    parser.add_argument("--codecs", nargs="+", default=["exact", "int8"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--plain", action="store_true", help="without the package's kernels")
    parser.add_argument(
        "--no-warmup", action="store_true", help="leave capturing to the first rounds, which don't count"
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--commit", help="what to record where there is no git")
    parser.add_argument("--trace", type=Path, help="file for a profiler trace of one request of the last setting")
    parser.add_argument("--out", type=Path, help="file for the JSON (default: standard output)")
    args = parser.parse_args()

    model = build(args.shape, args.device)
    copy_speed = host_to_device_speed() if args.device == "cuda" else float("inf")
    randoms = random.Random(0)
    passages = [
        "".join(randoms.choices(string.ascii_lowercase + " " * 5, k=args.chunk_tokens))
        for _ in range(max(args.contexts) // args.chunk_tokens)
    ]
    rows: list[dict[str, Any]] = []
    full: dict[int, dict[str, Any]] = {}
    for codec in args.codecs:
        for tier in args.tiers:
            with tempfile.TemporaryDirectory() as folder:
                path, host = (Path(folder) / "kv", 0) if tier == "disk" else (None, "48GiB")
                direct = True if tier == "disk" else None
                # One token between chunks, as a real tokenizer would have it.
                options = {"codec": codec, "host_budget": host, "direct_io": direct, "chunk_separator": "\n"}
                options["device_budget"] = "24GiB" if tier == "device" else 0  # filled by the rounds that don't count
                with CacheTune(model, tokenizer(), path, cuda_kernels=not args.plain, **options) as engine:
                    engine.precompute(passages)
                    started = time.perf_counter()
                    if not args.no_warmup:
                        engine.warmup(
                            int(max(args.ratios) * max(args.contexts)) + 256, [c + 256 for c in args.contexts]
                        )
                    print(f"warm-up {time.perf_counter() - started:.1f} s", flush=True)
                    for context in args.contexts:
                        chunks = passages[: context // args.chunk_tokens]
                        base, found = measure(engine, chunks, args)
                        full.setdefault(context, base)
                        for row in found:
                            row = {"context": context, "tier": tier, "codec": codec, **row}
                            moved = sum(size for where, size in row["bytes_read"].items() if where != "device")
                            row["copy"] = moved / copy_speed
                            row["floor"] = max(base["median"] * row["computed"] / row["prompt_tokens"], row["copy"])
                            row["share_of_floor"] = row["floor"] / row["ttft"]["median"]
                            rows.append(row)
                            print(line(row), flush=True)
                    if args.trace is not None:
                        trace(engine, chunks, args)
    env = environment() | ({"commit": args.commit} if args.commit else {}) | {"driver": driver()}
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in ("out", "commit")}
    peak = torch.cuda.max_memory_allocated() if args.device == "cuda" else 0
    result = {
        "benchmark": "ttft_gpu", "environment": env, "settings": settings, "copy_bytes_per_second": copy_speed,
        "peak_device_bytes": peak, "full_prefill": full, "rows": rows,
    }  # fmt: skip
    write_json(args.out, result)
    print(table(full, rows), f"peak {peak / 2**30:.1f} GiB", sep="\n", file=sys.stderr)


def build(shape: str, device: str) -> Any:
    """A random model of this shape in bfloat16."""
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(SHAPES[shape], dtype=torch.bfloat16).eval()


def measure(engine: CacheTune, chunks: list[str], args: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Medians of full prefill and of every (selector, ratio)."""
    settings = [(s, r) for s in args.selectors for r in args.ratios]
    times: dict[Any, list[float]] = {key: [] for key in [None, *settings]}
    reports: dict[Any, Any] = {}
    for round_ in range(args.rounds + 2):
        for key in times:
            if key is None:
                report = engine.full_prefill(query=QUERY, chunks=chunks, prefix="").report
            else:
                state = engine.prefill(query=QUERY, chunks=chunks, prefix="", selector=key[0], ratio=key[1])
                report = state.report
            assert report.missed == 0, report
            reports[key] = report
            if round_ >= 2:  # the first rounds warm up
                times[key].append(report.ttft)
    base = statistics.median(times[None])
    rows = []
    for key in settings:
        report, median = reports[key], statistics.median(times[key])
        rows.append(
            {
                "selector": key[0],
                "ratio": key[1],
                "prompt_tokens": report.prompt_tokens,
                "computed": report.computed,
                "bytes_read": report.bytes_read,
                "ttft": spread(times[key]),
                "full": base,
                "speedup": base / median,
                "timings": {name: round(seconds, 5) for name, seconds in report.timings.items()},
            }
        )
    return spread(times[None]), rows


def trace(engine: CacheTune, chunks: list[str], args: Any) -> None:
    """One request under torch's profiler: a timeline in which copies should lie under compute."""
    with torch.profiler.profile() as profiler:
        engine.prefill(query=QUERY, chunks=chunks, prefix="", selector=args.selectors[-1], ratio=args.ratios[-1])
    profiler.export_chrome_trace(str(args.trace))
    print(describe(read(args.trace)), file=sys.stderr)


def host_to_device_speed(size: int = 1 << 30) -> float:
    """Bytes a second of a copy from page-locked memory."""
    host, device = (
        torch.empty(size, dtype=torch.uint8, pin_memory=True),
        torch.empty(size, dtype=torch.uint8, device="cuda"),
    )
    best = float("inf")
    for _ in range(4):
        torch.cuda.synchronize()
        started = time.perf_counter()
        device.copy_(host, non_blocking=True)
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return size / best


def driver() -> str:
    """The GPU driver's version."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "none"


def line(row: dict[str, Any]) -> str:
    """One row for people."""
    return (
        f"| {row['context']} | {row['tier']} | {row['codec']} | {row['selector']} | {row['ratio']:g} | {row['computed']} "
        f"| {row['ttft']['median'] * 1e3:.1f} | {row['speedup']:.2f}x | {row['floor'] * 1e3:.1f} | {row['share_of_floor']:.0%} "
        f"| {', '.join(f'{k} {v * 1e3:.1f}' for k, v in row['timings'].items())} |"
    )


def table(full: dict[int, dict[str, Any]], rows: list[dict[str, Any]]) -> str:
    """All rows for people."""
    lines = [f"full prefill of {context}: {base['median'] * 1e3:.1f} ms" for context, base in full.items()]
    lines.append(
        "| context | tier | codec | selector | r | computed | TTFT ms | speed-up | floor ms | share | timings ms |"
    )
    lines.append("| --- " * 11 + "|")
    return "\n".join([*lines, *map(line, rows)])


if __name__ == "__main__":
    main()
