"""What benchmarks/timeline.py reads out of a profiler trace."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from timeline import common, describe, merge, read, summary


def event(cat: str, start: float, end: float, stream: int = 7, name: str = "kernel") -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "ts": start, "dur": end - start, "name": name, "args": {"stream": stream}}


def test_spans() -> None:
    assert merge([(5, 6), (0, 2), (1, 3), (3, 4)]) == [(0, 4), (5, 6)]
    assert common([(0, 4), (5, 9)], [(1, 2), (3, 6), (8, 20)]) == [(1, 2), (3, 4), (5, 6), (8, 9)]
    assert common([], [(1, 2)]) == []


def test_copies_under_compute(tmp_path: Path) -> None:
    events = [
        {"ph": "X", "cat": "cpu_op", "ts": 0, "dur": 90_000, "name": "launch", "args": {}},
        {"ph": "i", "name": "marker", "ts": 1},
        event("kernel", 10_000, 30_000),
        event("kernel", 40_000, 60_000),
        event("kernel", 30_000, 35_000, stream=8),  # another stream's: no cover for copies
        event("gpu_memcpy", 5_000, 20_000, 9, "Memcpy HtoD (Pinned -> Device)"),
        event("gpu_memcpy", 30_000, 45_000, 9, "Memcpy HtoD (Pinned -> Device)"),
        event("gpu_memcpy", 50_000, 60_000, 9, "Memcpy DtoH (Device -> Pageable)"),
    ]
    path = tmp_path / "trace.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    found = summary(read(path))
    expected = {
        "before_first_kernel": 10,
        "span": 50,
        "compute": 40,
        "idle": 10,
        "copies": 30,
        "copies_under_compute": 15,
    }
    assert found == pytest.approx(expected)
    assert "50% of it under computing" in describe(read(path))
