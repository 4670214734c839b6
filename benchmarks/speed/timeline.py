"""Runs one request under torch's profiler: how much is copied while the GPU computes, and when nothing computes."""

from __future__ import annotations

import gzip
import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

Span = tuple[float, float]
"""Beginning and end in microseconds."""
SHORT = 5.0
"""Microseconds. A gap up to this is just the time between one kernel and the next."""


def profile(run: Callable[[], Any], path: Path | None = None) -> dict[str, Any]:
    """Run once under the profiler.

    Args:
        run: runs a request, and returns when the device has finished.
        path: the file for the trace, which chrome://tracing and Perfetto open. It is gzipped if its name ends in .gz.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(plain))
        text = plain.read_bytes()
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return analyse(json.loads(text)["traceEvents"])


def analyse(events: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """What a trace says about a request. Times are in seconds.

    Returns:
        span: from the first to the last operation on the device. copy: while rows were copied to it (overlaps count once).
        copy_under_compute: the share of `copy` in which the compute stream was busy. compute: while the compute stream was busy. idle:
        while it was not, between its first and last kernel. gaps: [count, longest] of its idle times above 5 us. All are zero if
        nothing ran on a device.
    """
    kernels: dict[Any, list[Span]] = defaultdict(list)
    copies: list[Span] = []
    every: list[Span] = []
    for event in events:
        if event.get("ph") != "X" or "dur" not in event:
            continue
        span = (float(event["ts"]), float(event["ts"]) + float(event["dur"]))
        kind = event.get("cat", "")
        if kind == "kernel":
            kernels[event.get("args", {}).get("stream")].append(span)
        elif kind == "gpu_memcpy" and "HtoD" in event.get("name", ""):
            copies.append(span)
        if kind in ("kernel", "gpu_memcpy", "gpu_memset"):
            every.append(span)
    # The stream that works longest is the compute stream. Others decode and place rows.
    compute = joined(max(kernels.values(), key=total, default=[]))
    copied = joined(copies)
    gaps = [after[0] - before[1] for before, after in pairwise(compute)]
    gaps = [gap for gap in gaps if gap > SHORT]
    busy, moving = total(compute), total(copied)
    return {
        "span": (max(e for _, e in every) - min(b for b, _ in every)) / 1e6 if every else 0.0,
        "copy": moving / 1e6,
        "copy_under_compute": total(common(compute, copied)) / moving if moving else 0.0,
        "compute": busy / 1e6,
        "idle": (compute[-1][1] - compute[0][0] - busy) / 1e6 if compute else 0.0,
        "gaps": [len(gaps), max(gaps, default=0.0) / 1e6],
    }


def summary(found: dict[str, Any]) -> str:
    """What `analyse` returned, as text."""
    count, longest = found["gaps"]
    return (
        f"{found['span'] * 1e3:.1f} ms on the device: {found['copy'] * 1e3:.1f} ms of copies, "
        f"{found['copy_under_compute']:.0%} of them under compute; the compute stream busy for {found['compute'] * 1e3:.1f} ms and "
        f"idle for {found['idle'] * 1e3:.1f} ms ({count} gaps, the longest {longest * 1e3:.2f} ms)"
    )


def joined(spans: Iterable[Span]) -> list[Span]:
    """The same time as spans that don't overlap, in order."""
    found: list[Span] = []
    for begin, end in sorted(spans):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((begin, end))
    return found


def common(one: Sequence[Span], other: Sequence[Span]) -> list[Span]:
    """The time in which there is one of each. Spans of either don't overlap, and are in order."""
    found, i, j = [], 0, 0
    while i < len(one) and j < len(other):
        begin, end = max(one[i][0], other[j][0]), min(one[i][1], other[j][1])
        if begin < end:
            found.append((begin, end))
        if one[i][1] < other[j][1]:
            i += 1
        else:
            j += 1
    return found


def total(spans: Iterable[Span]) -> float:
    """How long they are together."""
    return sum(end - begin for begin, end in spans)
