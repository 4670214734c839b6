"""How much of the time to first token is spent on checking stored bytes, and on decrypting them.

    python benchmarks/checking.py --out benchmarks/results/checking-cpu.json

Every hash that the store computes during a request, and every decryption, is timed, on all threads, and the sum is compared with the request's time to first
token. Much of the hashing happens while the model computes, so its share is an upper bound. Rows are checked when they come from disk
(here they are read with O_DIRECT, and the host tier is empty). Rows in host memory were checked when they were read into it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from common import environment, real_chunks, spread, write_json
from smollm2 import model_path

from cachetune_rag import CacheTune
from cachetune_rag.model.loading import load_model
from cachetune_store import ChunkStore
from cachetune_store.encryption import FileCipher
from cachetune_store.keyed_hashes import KeyedHashes
from cachetune_store.keys import ChunkKey
from cachetune_store.seals import CHECKSUMS

KEY = bytes(range(32))
QUERY = "What does the text say about the order in which expressions are evaluated?"


class Clock:
    """Seconds spent and bytes hashed, over all threads."""

    def __init__(self) -> None:
        self.seconds, self.bytes = 0.0, 0
        self._lock = threading.Lock()

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function so that its time and the length of its buffers are counted."""

        def call(*arguments: Any) -> Any:
            started = time.perf_counter()
            result = function(*arguments)
            took = time.perf_counter() - started
            # Of what is found in a file. Where rows are decrypted, the last argument is where they go.
            found = [each for each in arguments[:5] if isinstance(each, bytes | memoryview)]
            with self._lock:
                self.seconds += took
                self.bytes += sum(map(len, found))
            return result

        return call


@contextmanager
def counted() -> Iterator[Clock]:
    """Count the hashes of rows and of heads, with a key or without, and their decryption."""
    clock = Clock()
    with ExitStack() as patched:
        for seal in (type(CHECKSUMS), KeyedHashes, FileCipher):
            for name in ("matches", "open_head"):
                patched.enter_context(mock.patch.object(seal, name, clock.timed(getattr(seal, name))))
        yield clock


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", type=Path, help="folder of a model (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--chunk-tokens", type=int, default=256)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.05, 0.15])
    parser.add_argument("--selectors", nargs="+", default=["auto", "frequency"])
    parser.add_argument("--codecs", nargs="+", default=["exact", "int8"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", type=Path, help="file for the JSON (default: standard output)")
    args = parser.parse_args()

    model, tokenizer = load_model(args.model or model_path(), device=args.device, dtype=args.dtype)
    chunks = real_chunks(tokenizer, args.chunks, args.chunk_tokens)
    rows = []
    for codec in args.codecs:
        with tempfile.TemporaryDirectory() as folder:
            engines = {
                "host": CacheTune(model, tokenizer, None, codec=codec),
                "disk": CacheTune(model, tokenizer, Path(folder) / "kv", codec=codec, host_budget=0, direct_io=True),
                "disk, with a key": CacheTune(
                    model, tokenizer, Path(folder) / "keyed", codec=codec, host_budget=0, direct_io=True, store_key=KEY
                ),
                "disk, encrypted": CacheTune(
                    model,
                    tokenizer,
                    Path(folder) / "encrypted",
                    codec=codec,
                    host_budget=0,
                    direct_io=True,
                    store_key=KEY,
                    encrypt=True,
                ),
            }
            for tier, engine in engines.items():
                engine.precompute(chunks)
                rows += [
                    measure(engine, chunks, tier=tier, codec=codec, selector=selector, ratio=ratio, rounds=args.rounds)
                    for selector in args.selectors
                    for ratio in args.ratios
                ]
                engine.close()
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k != "out"}
    write_json(
        args.out,
        {"benchmark": "checking", "environment": environment(), "settings": settings, "rates": rates(), "rows": rows},
    )
    print(table(rows), file=sys.stderr)


def measure(engine: CacheTune, chunks: list[str], *, rounds: int, **setting: Any) -> dict[str, Any]:
    """Time to first token and seconds of hashing with one setting. The first round only warms up."""
    times, hashing, hashed = [], [], 0
    for round_ in range(rounds + 1):
        with counted() as clock:
            report = engine.prefill(
                query=QUERY, chunks=chunks, ratio=setting["ratio"], selector=setting["selector"]
            ).report
        assert report.missed == 0, report
        if round_:
            times.append(report.ttft)
            hashing.append(clock.seconds)
            hashed = clock.bytes
    ttft, seconds = spread(times), spread(hashing)
    return {
        **setting,
        "ttft": ttft,
        "hashing": seconds,
        "bytes_hashed": hashed,
        "bytes_read": report.bytes_read,
        "share": seconds["median"] / ttft["median"],
    }


def rates(size: int = 256 << 10, total: int = 64 << 20) -> dict[str, float]:
    """GB that a core checks in a second of its time, without a key, with one, and encrypted, in blocks as a large model's."""
    key, block, into, found = ChunkKey("0" * 64), memoryview(bytes(size)), memoryview(bytearray(size)), {}
    with tempfile.TemporaryDirectory() as folder, ChunkStore(folder, store_key=KEY, encrypt=True) as store:
        seals = {"without a key": CHECKSUMS, "with a key": KeyedHashes(KEY), "encrypted": store.seal.new_file("")}
        for name, seal in seals.items():
            times = []
            expected = seal.rows(key, 0, 0, block, into)
            written = memoryview(bytes(into)) if seal.hides else block
            for _ in range(5):
                started = time.thread_time()
                for _ in range(total // size):
                    assert seal.matches(key, 0, 0, written, expected, into)
                times.append(time.thread_time() - started)
            found[name] = total / min(times) / 1e9
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text."""
    lines = ["| tier | codec | selector | r | TTFT ms | hashing ms | MiB hashed | share |", "| --- " * 8 + "|"]
    for row in rows:
        lines.append(
            f"| {row['tier']} | {row['codec']} | {row['selector']} | {row['ratio']:g} "
            f"| {row['ttft']['median'] * 1e3:.0f} | {row['hashing']['median'] * 1e3:.2f} "
            f"| {row['bytes_hashed'] / 2**20:.1f} | {row['share']:.2%} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
