"""Whether a disk gives the rows of a prompt's chunks sooner if several layers are read at once, with what lies between their wanted rows.

    python benchmarks/opening.py --fill kv --codec int4
    python benchmarks/pieces.py kv --out benchmarks/results/pieces.json

The files are read past the page cache, in the order in which a request needs layers: the first ones of all chunks, then the next ones. Nothing is checked or
decoded, so this is what the disk gives. All ways take turns, round by round.
"""

from __future__ import annotations

import argparse
import itertools
import mmap
import os
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import environment, write_json

HEAD = 1 << 15
PAGE = 4096


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("store", type=Path, help="a store that benchmarks/opening.py has filled")
    parser.add_argument("--together", type=int, nargs="+", default=[1, 2, 4, 8, 32], help="layers of one read")
    parser.add_argument("--shares", type=float, nargs="+", default=[1.0, 0.95, 0.85], help="of each layer's bytes")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--layer-kib", type=int, default=560, help="560: int4 of Llama-3.1-8B, 512 tokens")
    parser.add_argument("--threads", type=int, default=8, help="8: as many as an engine has")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="file for the JSON (default: standard output)")
    args = parser.parse_args()
    files = sorted((args.store / "chunks").rglob("*.safetensors"))
    if not files or files[0].stat().st_size < HEAD + args.layers * args.layer_kib * 1024:
        parser.error(f"{args.store} has no files of {args.layers} layers of {args.layer_kib} KiB")
    found: dict[tuple[float, int], list[float]] = {}
    for _ in range(args.rounds):
        for share, together in itertools.product(args.shares, args.together):
            taken = one(files, share, together, args.layers, args.layer_kib * 1024, args.threads)
            found.setdefault((share, together), []).append(taken)
    rows = [row(share, together, taken, len(files), args) for (share, together), taken in found.items()]
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    write_json(args.out, {"benchmark": "pieces", "environment": environment(), "settings": settings, "rows": rows})
    print(table(rows), file=sys.stderr)


def bytes_of(share: float, layer: int) -> int:
    """Bytes of whole pages that hold a share of a layer."""
    return -(-int(layer * share) // PAGE) * PAGE


def one(files: Sequence[Path], share: float, together: int, layers: int, layer: int, threads: int) -> float:
    """Seconds that it takes to read all layers of all files."""
    size = (together - 1) * layer + bytes_of(share, layer)
    opened = [os.open(file, os.O_RDONLY | os.O_DIRECT) for file in files]
    reads = iter([(fd, HEAD + number * layer) for number in range(0, layers, together) for fd in opened])
    lock = threading.Lock()

    def work() -> None:
        area = memoryview(mmap.mmap(-1, size))
        while True:
            with lock:
                read = next(reads, None)
            if read is None:
                return
            os.preadv(read[0], [area], read[1])

    workers = [threading.Thread(target=work) for _ in range(threads)]
    started = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    taken = time.perf_counter() - started
    for fd in opened:
        os.close(fd)
    return taken


def row(share: float, together: int, taken: Sequence[float], files: int, args: argparse.Namespace) -> dict[str, Any]:
    """What one way gave."""
    layer, seconds = args.layer_kib * 1024, statistics.median(taken)
    reads = files * -(-args.layers // together)
    used = files * args.layers * bytes_of(share, layer)
    return {
        "share": share, "together": together, "reads": reads, "ms": seconds * 1e3,
        "ms_from": min(taken) * 1e3, "ms_to": max(taken) * 1e3,
        "used_bytes_per_second": used / seconds, "reads_per_second": reads / seconds,
    }  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text."""
    lines = [
        "| share of rows | layers a read | reads | ms | spread | reads/s | GB/s of wanted rows |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for each in rows:
        lines.append(
            f"| {each['share']:g} | {each['together']} | {each['reads']} | {each['ms']:.0f} | {each['ms_from']:.0f} to "
            f"{each['ms_to']:.0f} | {each['reads_per_second']:.0f} | {each['used_bytes_per_second'] / 1e9:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
