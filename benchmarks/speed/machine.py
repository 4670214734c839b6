"""The best that the machine can do: copies to the device, reads from disk, attention, memory."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch

Attention = Callable[[], AbstractContextManager[Any]]


def synchronize(device: str) -> None:
    """Wait until the device has done everything."""
    if device == "cuda":
        torch.cuda.synchronize()


def copy_speed(device: str, size: int = 1 << 30) -> float | None:
    """Bytes a second of a copy from page-locked memory to the device; None on a CPU."""
    if device != "cuda":
        return None
    host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(size, dtype=torch.uint8, device=device)

    def copy() -> None:
        there.copy_(host, non_blocking=True)

    return size / _best(copy, device, 4)


def disk_speed(folder: Path, size: int = 1 << 29, threads: int = 4) -> tuple[float, bool]:
    """Bytes a second of large sequential reads from a file in a folder, and whether they avoided the page cache."""
    from concurrent.futures import ThreadPoolExecutor
    from mmap import mmap

    path, block = folder / "speed.bin", 1 << 24
    size = size // (threads * block) * threads * block
    with path.open("wb") as file:
        for _ in range(size // block):
            file.write(os.urandom(1 << 12) * (block >> 12))
        os.fsync(file.fileno())
    direct = True
    try:
        opened = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        direct, opened = False, os.open(path, os.O_RDONLY)

    def read(part: int) -> None:
        memory = mmap(-1, block)  # at a page boundary, as direct reads require
        for start in range(part * (size // threads), (part + 1) * (size // threads), block):
            os.preadv(opened, [memory], start)

    try:
        with ThreadPoolExecutor(threads) as pool:
            started = time.perf_counter()
            list(pool.map(read, range(threads)))
            return size / (time.perf_counter() - started), direct
    finally:
        os.close(opened)
        path.unlink()


def fastest_attention(run: Callable[[], Any], device: str) -> tuple[str, Attention]:
    """The backend of torch's scaled_dot_product_attention with which `run` is fastest."""
    if device != "cuda":
        return "default", nullcontext
    from torch.nn.attention import SDPBackend, sdpa_kernel

    ways: dict[str, Attention] = {
        "default": nullcontext,
        "flash": lambda: sdpa_kernel([SDPBackend.FLASH_ATTENTION]),
        "cudnn": lambda: sdpa_kernel([SDPBackend.CUDNN_ATTENTION]),
    }
    took = {}
    for name, way in ways.items():
        with suppress(RuntimeError), way():
            run()
            took[name] = _best(run, device, 2)
    name = min(took, key=lambda n: took[n])
    # The backend that torch chooses itself, unless another one is clearly faster.
    name = name if took[name] < 0.98 * took["default"] else "default"
    return name, ways[name]


def driver() -> str:
    """The GPU driver's version."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
        return ", ".join(dict.fromkeys(found))  # one line for each GPU
    except (OSError, subprocess.CalledProcessError):
        return "none"


def _best(run: Callable[[], Any], device: str, rounds: int) -> float:
    best = float("inf")
    for _ in range(rounds):
        synchronize(device)
        started = time.perf_counter()
        run()
        synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best
