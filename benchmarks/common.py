"""What benchmarks have in common: real text, medians, and a record of the machine."""

from __future__ import annotations

import json
import platform
import pydoc_data.topics
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))


def real_chunks(tokenizer: Any, count: int, tokens: int, skip: int = 0) -> list[str]:
    """`count` contiguous passages of about `tokens` tokens from Python's own language reference."""
    text = "\n\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    ids = tokenizer(text[: (skip + count * tokens) * 8], add_special_tokens=False).input_ids[skip:]
    return [tokenizer.decode(ids[i * tokens : (i + 1) * tokens]) for i in range(count)]


def seconds(work: Callable[[], Any]) -> float:
    """Seconds that one call takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def spread(samples: Sequence[float]) -> dict[str, Any]:
    """The median and the samples."""
    return {"median": statistics.median(samples), "samples": [round(s, 5) for s in samples]}


def environment() -> dict[str, Any]:
    """The machine and the versions that a measurement was made with."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=ROOT, capture_output=True, text=True)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "commit": commit.stdout.strip() + ("+changes" if dirty.stdout.strip() else ""),
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()


def write_json(path: Path | None, result: dict[str, Any]) -> None:
    """Write JSON to a file, or to standard output."""
    text = json.dumps(result, indent=2)
    if path is None:
        print(text)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
        print(f"wrote {path}", file=sys.stderr)
