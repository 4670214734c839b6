"""What is read, and how long it takes, until the first layer of a prompt's chunks is there from disk.

    python benchmarks/opening.py --fill kv --codec int4
    python benchmarks/opening.py --measure kv --out benchmarks/results/opening.json

The chunks are random numbers of Llama-3.1-8B's shape, and are read past the page cache by as many threads as an engine has. "frequency" needs
the first rows of every chunk alone, "expected_error" their deviations as well. Each is measured with a store that was just opened ("read": the
heads of the files are read), and with one that has had the files open before ("known"). All take turns, round by round.

Several stores may be measured together: one that an earlier commit has filled shows what its format costs.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from common import environment, write_json

from cachetune_rag.concurrency.deadline import DeadlinePool
from cachetune_store import ChunkKey, ChunkReader, ChunkStore, Namespace, make_key

LEAD_INS = tuple(tuple(range(200 * n, 200 * n + 200)) for n in range(1, 5))
"""As many and as long as an engine chooses."""
NAMESPACE = Namespace("0" * 64, "0" * 64, "bfloat16", LEAD_INS)
TOKENS, LAYERS, HEADS, HEAD_DIM = 512, 32, 8, 128
TEXT = "word " * 400


def main() -> None:
    """Fill a store, or measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--fill", type=Path, metavar="STORE", help="make a store, and measure nothing")
    parser.add_argument("--measure", type=Path, nargs="+", metavar="STORE", help="stores that were filled")
    parser.add_argument("--codec", default="int4", help="of the chunks, with --fill")
    parser.add_argument("--chunks", type=int, default=32)
    parser.add_argument("--rows", type=int, default=435, help="of each chunk's first layer: r 0.15")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="file for the JSON (default: standard output)")
    args = parser.parse_args()
    if (args.fill is None) == (args.measure is None):
        parser.error("give --fill STORE or --measure STORE")
    keys = [make_key(NAMESPACE, [number] * TOKENS) for number in range(args.chunks)]
    if args.fill is not None:
        fill(args.fill, args.codec, keys)
        return
    rows = measure(args.measure, keys, args.rows, args.rounds)
    settings = {"chunks": args.chunks, "rows": args.rows, "rounds": args.rounds}
    write_json(args.out, {"benchmark": "opening", "environment": environment(), "settings": settings, "rows": rows})
    print(table(rows), file=sys.stderr)


def fill(path: Path, codec: str, keys: Sequence[ChunkKey]) -> None:
    """Store random chunks."""
    torch.manual_seed(0)
    shape = (TOKENS, HEADS, HEAD_DIM)
    layers = [(torch.randn(shape).bfloat16(), torch.randn(shape).bfloat16()) for _ in range(LAYERS)]
    with ChunkStore(path, codec=codec, host_budget=0) as store:
        for number, key in enumerate(keys):
            store.put(
                key, layers, torch.rand(TOKENS), namespace=NAMESPACE, token_ids=[number] * TOKENS, text=TEXT,
                deviations=torch.rand(TOKENS, 2 * HEADS * LAYERS),
            )  # fmt: skip


class Reads:
    """Counts the reads of files, and their bytes, while it is open."""

    def __init__(self) -> None:
        self.count = self.bytes = 0
        self._real = os.preadv

    def __enter__(self) -> Reads:
        os.preadv = self._preadv  # type: ignore[assignment]
        return self

    def __exit__(self, *error: object) -> None:
        os.preadv = self._real

    def _preadv(self, fd: int, areas: list[memoryview], position: int) -> int:
        found = self._real(fd, areas, position)
        self.count, self.bytes = self.count + 1, self.bytes + found
        return found


def measure(paths: Sequence[Path], keys: Sequence[ChunkKey], rows: int, rounds: int) -> list[dict[str, Any]]:
    """A row for each store, selector, and whether heads are known."""
    found: dict[tuple[str, str, str], list[dict[str, float]]] = {}
    pool = DeadlinePool(60.0)
    with ExitStack() as stack:
        stack.callback(pool.close)
        known = {path: stack.enter_context(_opened(path)) for path in paths}
        for number in range(rounds + 1):
            for path in paths:
                for selector in ("frequency", "expected_error"):
                    with _opened(path) as new:
                        for heads, store in (("read", new), ("known", known[path])):
                            sample = one(store, keys, rows, pool, selector == "expected_error")
                            if number:  # the first round fills what a process keeps
                                found.setdefault((path.name, selector, heads), []).append(sample)
    return [
        {"store": store, "selector": selector, "heads": heads, "rounds": len(samples)}
        | {name: statistics.median(s[name] for s in samples) for name in samples[0]}
        | {"first_layer_ms_from": min(s["first_layer_ms"] for s in samples)}
        | {"first_layer_ms_to": max(s["first_layer_ms"] for s in samples)}
        for (store, selector, heads), samples in found.items()
    ]


def _opened(path: Path) -> ChunkStore:
    return ChunkStore(path, host_budget=0, direct_io=True)


def one(
    store: ChunkStore, keys: Sequence[ChunkKey], rows: int, pool: DeadlinePool, deviations: bool
) -> dict[str, float]:
    """One prompt: all chunks are opened, then their first layer is read, and the deviations if they are wanted."""
    with Reads() as reads:
        started = time.perf_counter()
        readers = [job.result() for job in [pool.submit(store.open, key) for key in keys]]
        assert None not in readers, "fill the store with as many chunks"
        opened = {"open_ms": (time.perf_counter() - started) * 1e3}
        opened |= {"open_reads": reads.count, "open_bytes": reads.bytes}
        jobs = [pool.submit(_deviations, reader) for reader in readers if deviations]
        jobs += [pool.submit(reader.read, 0, rows) for reader in readers]
        for job in jobs:
            job.result()
        there = {"first_layer_ms": (time.perf_counter() - started) * 1e3}
        there |= {"first_layer_reads": reads.count, "first_layer_bytes": reads.bytes}
    for reader in readers:
        reader.close()
    return opened | there


def _deviations(reader: ChunkReader) -> torch.Tensor | None:
    return reader.deviations


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text."""
    lines = [
        "| store | selector | heads | open, ms | reads, MB | first layer there, ms | spread | reads, MB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        lines.append(
            f"| {row['store']} | `{row['selector']}` | {row['heads']} | {row['open_ms']:.1f} "
            f"| {row['open_reads']:.0f}, {row['open_bytes'] / 1e6:.1f} | {row['first_layer_ms']:.1f} "
            f"| {row['first_layer_ms_from']:.1f} to {row['first_layer_ms_to']:.1f} "
            f"| {row['first_layer_reads']:.0f}, {row['first_layer_bytes'] / 1e6:.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
