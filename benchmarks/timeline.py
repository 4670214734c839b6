"""How much of the copying lies under computing, from a profiler trace of one request.

    python benchmarks/ttft_gpu.py --contexts 16384 --trace trace.json.gz ...
    python benchmarks/timeline.py trace.json.gz

The trace is a Chrome trace (chrome://tracing, perfetto.dev). A copy lies under computing where the stream that computes is
busy at that moment.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Span = tuple[float, float]


def main() -> None:
    """Read a trace and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("trace", type=Path)
    print(describe(read(parser.parse_args().trace)))


def read(path: Path) -> list[dict[str, Any]]:
    """The events of a trace that have a duration."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [event for event in json.loads(data)["traceEvents"] if event.get("ph") == "X"]


def summary(events: Sequence[dict[str, Any]]) -> dict[str, float]:
    """What a trace says, in milliseconds.

    `copies`: time in which rows are copied to the device; `copies_under_compute`: the part of it in which kernels of the
    computing stream run (the stream with the most kernel time); `compute`, `span`: their time, and first to last;
    `idle`: of the computing stream in between; `before_first_kernel`: from the first event on the host.
    """
    kernels = [e for e in events if e.get("cat") in ("kernel", "gpu_memset")]
    streams = {e["args"]["stream"] for e in kernels}
    busiest = max(streams, key=lambda s: sum(e["dur"] for e in kernels if e["args"]["stream"] == s), default=None)
    compute = merge((e["ts"], e["ts"] + e["dur"]) for e in kernels if e["args"]["stream"] == busiest)
    copies = merge(
        (e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") == "gpu_memcpy" and "HtoD" in e["name"]
    )
    host = min((e["ts"] for e in events), default=0.0)
    span = compute[-1][1] - compute[0][0] if compute else 0.0
    return {
        "before_first_kernel": (compute[0][0] - host if compute else 0.0) / 1e3,
        "span": span / 1e3,
        "compute": total(compute) / 1e3,
        "idle": (span - total(compute)) / 1e3,
        "copies": total(copies) / 1e3,
        "copies_under_compute": total(common(copies, compute)) / 1e3,
    }


def describe(events: Sequence[dict[str, Any]]) -> str:
    """The summary for people."""
    found = summary(events)
    share = found["copies_under_compute"] / found["copies"] if found["copies"] else 0.0
    return (
        f"computing stream: {found['compute']:.1f} ms busy and {found['idle']:.1f} ms idle within {found['span']:.1f} ms; "
        f"{found['before_first_kernel']:.1f} ms before its first kernel\n"
        f"copies to the device: {found['copies']:.1f} ms, {share:.0%} of it under computing"
    )


def merge(spans: Iterable[Span]) -> list[Span]:
    """The spans' union, ascending and apart."""
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def common(a: Sequence[Span], b: Sequence[Span]) -> list[Span]:
    """What two merged lists have in common."""
    found, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        start, end = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if start < end:
            found.append((start, end))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return found


def total(spans: Iterable[Span]) -> float:
    """Their length."""
    return sum(end - start for start, end in spans)


if __name__ == "__main__":
    main()
