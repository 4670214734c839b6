"""How much several processes read at once from one store.

    python benchmarks/reads.py --out benchmarks/results/reads.json
    python benchmarks/reads.py --direct --out benchmarks/results/reads-direct.json
    python benchmarks/reads.py --results benchmarks/results/reads*.json --plot benchmarks/results/reads.svg

Each process opens the store with an empty host tier. For some seconds it reads whole chunks in random order and checks every row. All
processes begin at once. Chunks have the shape of SmolLM2-135M's KV in float32 unless another is given. With --direct, reads don't use the
page cache, so they show the disk's speed. Without it, they come from the page cache once it is warm, and show the speed of memory and
checking. With --results nothing is measured, and the plot shows earlier results.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import environment, write_json

from cachetune_store import ChunkStore, Namespace, make_key

NAMESPACE = Namespace("benchmark", "none", "float32", ((1,),))
SPAWN = multiprocessing.get_context("spawn")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--chunks", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--codec", default="exact")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--direct", action="store_true", help="read past the page cache")
    parser.add_argument("--folder", type=Path, help="where to put the store (default: a temporary folder)")
    parser.add_argument("--out", type=Path, help="file for the JSON (default: standard output)")
    parser.add_argument("--plot", type=Path, help="file for a plot (needs matplotlib)")
    parser.add_argument("--results", type=Path, nargs="+", metavar="JSON", help="plot these, and measure nothing")
    args = parser.parse_args()
    if args.results:
        if args.plot is None:
            parser.error("--results needs --plot: a file for the plot")
        plot([json.loads(path.read_text()) for path in args.results], args.plot)
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder) / "kv"
        size = fill(path, args)
        rows = [measure(path, count, args) for count in args.processes]
    for row in rows:
        row["scaling"] = row["bytes_per_second"] / rows[0]["bytes_per_second"]
    settings = {
        k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in ("out", "plot", "results")
    }
    result = {
        "benchmark": "reads",
        "environment": environment(),
        "settings": settings,
        "chunk_bytes": size,
        "rows": rows,
    }
    write_json(args.out, result)
    print(table(rows), file=sys.stderr)
    if args.plot is not None:
        plot([result], args.plot)


def fill(path: Path, args: argparse.Namespace) -> int:
    """Store random chunks. Returns the bytes of one."""
    torch.manual_seed(0)
    size = 0
    with ChunkStore(path, codec=args.codec, host_budget=0) as store:
        for number in range(args.chunks):
            ids = [number] * args.tokens
            shape = (args.tokens, args.heads, args.head_dim)
            layers = [(torch.randn(shape), torch.randn(shape)) for _ in range(args.layers)]
            scores = torch.rand(args.tokens)
            size = store.put(make_key(NAMESPACE, ids), layers, scores, namespace=NAMESPACE, token_ids=ids)
    return size


def measure(path: Path, processes: int, args: argparse.Namespace) -> dict[str, Any]:
    """Bytes a second of all processes together, and seconds for one chunk, from the median round."""
    rounds = [one_round(path, processes, args) for _ in range(args.rounds)]
    rounds.sort(key=lambda row: row["bytes_per_second"])
    middle = rounds[len(rounds) // 2]
    return {**middle, "rounds": [row["bytes_per_second"] for row in rounds]}


def one_round(path: Path, processes: int, args: argparse.Namespace) -> dict[str, Any]:
    """All processes read at once."""
    ready, results = SPAWN.Barrier(processes), SPAWN.Queue()
    workers = [
        SPAWN.Process(
            target=read, args=(str(path), seed, args.chunks, args.tokens, args.seconds, args.direct, ready, results)
        )
        for seed in range(processes)
    ]
    for worker in workers:
        worker.start()
    found = [results.get() for _ in workers]
    for worker in workers:
        worker.join()
    took = sorted(t for times, _ in found for t in times)
    return {
        "processes": processes,
        "bytes_per_second": sum(count for _, count in found) / args.seconds,
        "chunks_per_second": len(took) / args.seconds,
        "chunk_ms_p50": statistics.median(took) * 1e3,
        "chunk_ms_p99": took[min(len(took) - 1, int(len(took) * 0.99))] * 1e3,
    }


def read(
    path: str, seed: int, chunks: int, tokens: int, seconds: float, direct: bool, ready: Any, results: Any
) -> None:
    """What one process does: read chunks until the time is over."""
    torch.set_num_threads(1)
    rng = random.Random(seed)
    keys = [make_key(NAMESPACE, [number] * tokens) for number in range(chunks)]
    times, count = [], 0
    with ChunkStore(path, host_budget=0, direct_io=direct) as store:
        for key in keys:  # the first pass warms up whatever there is to warm up
            with store.open(key) as reader:
                reader.read(0, tokens)
        ready.wait()
        end = time.perf_counter() + seconds
        while (started := time.perf_counter()) < end:
            with store.open(rng.choice(keys)) as reader:
                for layer in range(len(reader.layout.layers)):
                    reader.read(layer, tokens)
                count += reader.bytes_read
            times.append(time.perf_counter() - started)
    results.put((times, count))


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text."""
    lines = ["| processes | GB/s | chunks/s | p50 ms | p99 ms | scaling |", "| --- | --- | --- | --- | --- | --- |"]
    for row in rows:
        lines.append(
            f"| {row['processes']} | {row['bytes_per_second'] / 1e9:.2f} | {row['chunks_per_second']:.0f} "
            f"| {row['chunk_ms_p50']:.1f} | {row['chunk_ms_p99']:.1f} | {row['scaling']:.2f}x |"
        )
    return "\n".join(lines)


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Plot throughput, and time for one chunk, by the number of processes. Each way of reading has its colour."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, result in enumerate(results):
        name = "past the page cache" if result["settings"]["direct"] else "page cache warm"
        rows, color = result["rows"], f"C{number}"
        processes = [row["processes"] for row in rows]
        left.plot(processes, [row["bytes_per_second"] / 1e9 for row in rows], marker="o", color=color, label=name)
        for part, line in (("p50", "-"), ("p99", "--")):
            times = [row[f"chunk_ms_{part}"] for row in rows]
            right.plot(processes, times, line, marker="o", color=color, label=f"{name}, {part}")
    left.set(xlabel="processes", ylabel="GB/s, all together", ylim=(0, None))
    right.set(xlabel="processes", ylabel="ms a chunk", ylim=(0, None))
    for axes in (left, right):
        axes.legend(fontsize="small")
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
