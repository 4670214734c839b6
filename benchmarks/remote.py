"""What the remote tier gives, against the client that reaches the place and against the disk.

    python benchmarks/remote.py reads --out benchmarks/results/remote-reads.json
    python benchmarks/remote.py ttft --out benchmarks/results/remote-ttft.json

`reads`: threads read layers of chunks from S3 (SeaweedFS), Valkey and a folder, in turns through the store (rows are checked, and put into
page-aligned memory) and by the client library alone (obstore, Valkey GLIDE), which gives unchecked bytes in memory of its own: once kept until the
chunk is complete, once dropped layer by layer. `ttft`: time to first token with all chunks in the remote tier, behind a proxy
that lets only so many bits a second pass, against the same chunks on disk and full prefill. The servers run on the same machine, and take
cores from what is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import subjects
import torch
from common import ROOT, environment, spread, write_json

sys.path.insert(0, str(ROOT / "tests"))
from remote_servers import BUCKET, missing, s3_options, s3_server, valkey_server
from tcp_proxy import TcpProxy

from cachetune_rag import CacheTune, Document
from cachetune_store import ChunkKey, ChunkStore, Namespace, make_key

NAMESPACE = Namespace("benchmark", "none", "bfloat16", ((1,),))
PLACES = ("folder", "s3", "valkey")
ReadRange = Callable[[str, int, int], Any]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("what", choices=["reads", "ttft"])
    parser.add_argument("--places", nargs="+", choices=PLACES, default=PLACES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="file for the JSON (default: standard output)")
    reads = parser.add_argument_group("reads")
    reads.add_argument("--threads", type=int, nargs="+", default=[1, 8])
    reads.add_argument("--layers", type=int, default=32)
    reads.add_argument("--heads", type=int, default=8)
    reads.add_argument("--head-dim", type=int, default=128)
    reads.add_argument("--tokens", type=int, default=256)
    reads.add_argument("--seconds", type=float, default=2.0)
    ttft = parser.add_argument_group("ttft")
    ttft.add_argument("--gigabits", type=float, nargs="+", default=[1, 10, 100])
    ttft.add_argument("--latency", type=float, default=0.0005, help="seconds that each answer takes longer")
    ttft.add_argument("--ratio", type=float, default=0.15)
    ttft.add_argument("--codec", default="exact")
    subjects.add_arguments(parser)
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        rows = (measure_reads if args.what == "reads" else measure_ttft)(args, stack)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    write_json(
        args.out, {"benchmark": f"remote-{args.what}", "environment": environment(), "settings": settings, "rows": rows}
    )
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items() if name != "samples"), file=sys.stderr)


@contextlib.contextmanager
def opened(place: str) -> Iterator[tuple[str, dict[str, Any], int]]:
    """Start a server. Gives its URL, the options to reach it, and its port (0: none)."""
    if (why := missing(place)) is not None:
        raise SystemExit(f"{place} can't be measured: {why}")
    if place == "folder":
        with tempfile.TemporaryDirectory() as folder:
            yield f"file://{folder}/shared", {}, 0
    elif place == "s3":
        with s3_server() as port:
            yield f"s3://{BUCKET}/benchmark", s3_options(port), port
    else:
        with valkey_server() as port:
            yield f"valkey://127.0.0.1:{port}", {}, port


def measure_reads(args: argparse.Namespace, stack: contextlib.ExitStack) -> list[dict[str, Any]]:
    """Bytes and reads a second of each place, by client and by store."""
    rows = []
    for place in args.places:
        url, options, _ = stack.enter_context(opened(place))
        store = stack.enter_context(ChunkStore(url, host_budget=0, remote_options=options))
        keys = [_fill(store, seed, args) for seed in range(8)]
        client = _client(url, options)
        for threads in args.threads:
            ways: dict[str, Callable[[int], tuple[int, int]]] = {
                "client, kept": partial(_read_plainly, store, client, keys, args.layers, True),
                "client, dropped": partial(_read_plainly, store, client, keys, args.layers, False),
                "store": partial(_read_rows, store, keys),
            }
            found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ways}
            for _ in range(args.rounds):
                for name, way in ways.items():
                    found[name].append(_rate(way, threads, args.seconds))
            row: dict[str, Any] = {"place": place, "threads": threads}
            for name, each in found.items():
                row[f"{name} GB/s"] = round(statistics.median(size for size, *_ in each) / 1e9, 3)
                row[f"{name} layers/s"] = round(statistics.median(count for _, count, _ in each))
                row[f"{name} core ms/GB"] = round(statistics.median(core * 1e12 / size for size, _, core in each))
            for name in ("kept", "dropped"):
                row[f"share of {name}"] = round(row["store GB/s"] / row[f"client, {name} GB/s"], 3)
            row["samples"] = found
            rows.append(row)
    return rows


def _fill(store: ChunkStore, seed: int, args: argparse.Namespace) -> ChunkKey:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 50_000, (args.tokens,), generator=generator).tolist()
    shape = (args.tokens, args.heads, args.head_dim)
    layer = torch.randn(shape, generator=generator).bfloat16()
    key = make_key(NAMESPACE, ids)
    store.put(
        key,
        [(layer, layer)] * args.layers,
        torch.rand(args.tokens, generator=generator),
        namespace=NAMESPACE,
        token_ids=ids,
    )
    return key


def _read_rows(store: ChunkStore, keys: list[ChunkKey], turn: int) -> tuple[int, int]:
    """Read a chunk through the store, layer by layer. Gives bytes and layers."""
    with store.open(keys[turn % len(keys)]) as reader:  # type: ignore[union-attr]
        layout = reader.layout
        for layer in range(len(layout.layers)):
            reader.read(layer, layout.tokens)
        return reader.bytes_read, len(layout.layers)


def _client(url: str, options: dict[str, Any]) -> ReadRange:
    """What reads a range of an object by the client library alone: its own call, with nothing of the package around it."""
    if url.startswith("valkey:"):
        from glide_sync import GlideClient, GlideClientConfiguration, NodeAddress

        where = urlsplit(url)
        server = GlideClient.create(GlideClientConfiguration([NodeAddress(where.hostname, where.port)]))
        return lambda name, start, size: server.getrange(name, start, start + size - 1)
    import obstore

    bucket = obstore.store.from_url(url, **options)
    return lambda name, start, size: obstore.get_range(bucket, name, start=start, length=size)


def _read_plainly(
    store: ChunkStore, client: ReadRange, keys: list[ChunkKey], layers: int, keep: bool, turn: int
) -> tuple[int, int]:
    """Read the same ranges by the client alone, after the head, as the store does.

    With `keep`, what it gives is kept until the chunk's last layer is there, as whoever uses a chunk has to. Otherwise each layer is dropped before
    the next is asked for, so that the client can write it into the same memory, which the processor's cache has.
    """
    record = store.index.get(f"remote/{keys[turn % len(keys)]}")
    client(record["object"], 0, record["head"])
    step = (record["size"] - record["head"]) // layers
    size, kept = 0, []
    for layer in range(layers):
        found = client(record["object"], record["head"] + layer * step, step)
        size += len(found)
        if keep:
            kept.append(found)
    return size, layers


def _rate(read: Callable[[int], tuple[int, int]], threads: int, seconds: float) -> tuple[float, float, float]:
    """Bytes, layers and seconds of this process's cores a second, over threads. The last says little of what else the machine does."""
    turns = itertools.count()
    done: list[tuple[int, int]] = []
    began, core = time.perf_counter(), time.process_time()

    def work() -> None:
        while time.perf_counter() - began < seconds:
            done.append(read(next(turns)))

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    took = time.perf_counter() - began
    core = time.process_time() - core
    return sum(size for size, _ in done) / took, sum(count for _, count in done) / took, core / took


def measure_ttft(args: argparse.Namespace, stack: contextlib.ExitStack) -> list[dict[str, Any]]:
    """Time to first token: full prefill, chunks on disk, and chunks behind several bandwidths."""
    model, tokenizer = subjects.load(args)
    chunks = subjects.passages(args, tokenizer, 1)[0]
    ask: dict[str, Any] = {"query": "What is this about?", "chunks": chunks}
    place = next(each for each in args.places if each != "folder")
    url, options, port = stack.enter_context(opened(place))
    proxy = stack.enter_context(TcpProxy("127.0.0.1", port))
    through = url.replace(str(port), str(proxy.port))
    if place == "s3":
        options = options | {"endpoint": f"http://127.0.0.1:{proxy.port}"}
    path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "kv"
    shared = {"remote": url, "remote_options": options, "remote_timeout": 600.0, "read_timeout": None}
    rows: list[dict[str, Any]] = []
    with CacheTune(model, tokenizer, path, codec=args.codec, **shared) as engine:
        engine.precompute(Document("all", chunks))
        engine.store.sync()
        engine.full_prefill(**ask)
        rows.append({"what": "full prefill"} | _times(lambda: engine.full_prefill(**ask), args.rounds))
    with CacheTune(model, tokenizer, path, host_budget=0) as engine:
        rows.append({"what": "disk"} | _reused(engine, ask, args))
    del shared["remote"]
    with CacheTune(model, tokenizer, through, host_budget=0, **shared) as engine:
        proxy.latency = args.latency
        for gigabits in args.gigabits:
            proxy.rate = gigabits * 1e9 / 8
            rows.append({"what": f"{place}, {gigabits:g} Gb/s"} | _reused(engine, ask, args))
    for row in rows:
        row["speed-up"] = round(rows[0]["median"] / row["median"], 2)
    return rows


def _reused(engine: CacheTune, ask: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Times of requests that reuse all chunks."""

    def request() -> Any:
        report = engine.prefill(**ask, ratio=args.ratio, selector="frequency").report
        if report.missed:
            raise SystemExit(f"{report.missed} tokens were not in the store")
        return report

    read = sum(request().bytes_read.values())
    return _times(request, args.rounds) | {"MB": round(read / 1e6, 1)}


def _times(work: Callable[[], Any], rounds: int) -> dict[str, Any]:
    samples = []
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        samples.append(time.perf_counter() - began)
    return spread(samples)


if __name__ == "__main__":
    main()
