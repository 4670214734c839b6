"""Simulates replicas that answer from one large corpus, and computes what to size.

    python benchmarks/fleet.py --out benchmarks/results/fleet.json > tables.md

It is a simulation: nothing is computed on a GPU and nothing is sent. How long a prompt takes was measured (--times, a file of benchmarks/serving.py), bytes are
the store's own layout, and the order of replicas is the router's own. The rest are parameters. docs/scale.md has the tables and says what is left out.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(Path(__file__).parent), str(ROOT), str(ROOT / "store"), str(ROOT / "adapters")]

from common import environment, write_json  # noqa: E402
from simulation.caches import hit_rate  # noqa: E402
from simulation.checks import check_caches, check_queue  # noqa: E402
from simulation.corpus import Corpus  # noqa: E402
from simulation.costs import Prices, answering, precompute_hours, reusing  # noqa: E402
from simulation.measured import read_times  # noqa: E402
from simulation.replicas import TIERS, Fleet, Outcome, full_recompute, simulate  # noqa: E402
from simulation.sizes import CODECS, MODELS, size_of  # noqa: E402
from simulation.tables import markdown  # noqa: E402

GBIT = 1e9 / 8
SWEEPS: dict[str, dict[str, Any]] = {
    "network 1 Gb/s": {"network": 1.0},
    "network 5 Gb/s": {"network": 5.0},
    "network 100 Gb/s": {"network": 100.0},
    "exact in the remote tier": {"remote_codec": "exact"},
    "flat corpus (zipf 0)": {"zipf": 0.0},
    "flatter corpus (zipf 0.6)": {"zipf": 0.6},
    "steeper corpus (zipf 1.2)": {"zipf": 1.2},
    "chunks of a request unrelated": {"together": 0.0},
    "32 GB of host memory": {"host": 32.0},
    "a fifth of the chunks nowhere": {"missing": 0.2},
    "short prompts (4,096 tokens)": {"context": 4096},
    "answers of 16 tokens": {"answer": 16},
    "answers of 1,024 tokens": {"answer": 1024},
    "a 20th of the requests": {"rate_share": 0.05},
    "frequency 0.05": {"setting": "frequency 0.05"},
}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Simulate what the arguments say; print tables and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add(parser)
    args = parser.parse_args(arguments)
    try:
        result = run(args)
    except ValueError as error:
        parser.error(str(error))
    print(markdown(result))
    if args.out:
        write_json(args.out, result)
    return result


def add(parser: argparse.ArgumentParser) -> None:
    """The arguments. Bytes are decimal: a GB is 10**9 bytes, a Gb 10**9 bits."""
    add = parser.add_argument
    add("--times", type=Path, default=ROOT / "benchmarks/results/serving-h200.json", help="measured times")
    add("--setting", default="default 0.15", help="how chunks are reused, as in that file")
    add("--context", type=at_least(1, int), default=16384, help="tokens of chunks of a request, as in that file")
    add("--chunk-tokens", type=at_least(1, int), default=512)
    add("--model", choices=sorted(MODELS), default="llama-3.1-8b", help="whose KV; the times should be of this shape")
    add("--codec", choices=CODECS, default="exact", help="in host memory and on disk")
    add("--remote-codec", choices=CODECS, default="int4")
    add("--replicas", type=at_least(1, int), default=64)
    add("--chunks", type=at_least(1, int), default=10_000_000, help="of the corpus")
    add("--zipf", type=at_least(0, float), default=0.9, help="how uneven topics are asked for; 0: all alike")
    add("--topic", type=at_least(1, int), default=100, help="chunks of a topic")
    add("--together", type=at_least(0, float), default=0.75, help="share of a request's chunks that are of one topic")
    add("--rate", type=above(0), default=1.2, help="requests a second and replica")
    add("--answer", type=at_least(1, int), default=64, help="tokens of an answer")
    add("--host", type=at_least(0, float), default=256.0, help="GB of host memory for chunks, each replica")
    add("--disk", type=at_least(0, float), default=1000.0, help="GB of disk for chunks, each replica")
    add("--disk-speed", type=above(0), default=5.0, help="GB/s, each replica")
    add("--network", type=above(0), default=25.0, help="Gb/s to the remote tier, each replica")
    add("--latency", type=at_least(0, float), default=0.02, help="seconds until the remote tier begins to answer")
    add("--missing", type=at_least(0, float), default=0.01, help="share of chunk requests whose chunk is nowhere")
    add("--changed", type=at_least(0, float), default=0.01, help="share of the corpus that changes in a day")
    add("--gpu-hour", type=at_least(0, float), default=3.0, help="dollars: a GPU and its share of a machine")
    add("--gigabyte-month", type=at_least(0, float), default=0.023, help="dollars: remote storage")
    add("--thousand-reads", type=at_least(0, float), default=0.0004, help="dollars: requests to remote storage")
    add("--busy", type=above(0), default=0.7, help="how busy GPUs may be on average")
    add("--requests", type=at_least(2, int), default=1280, help="that count, in the first table")
    add("--warm-up", type=at_least(0, int), default=2560, help="before them, that don't")
    add("--seeds", type=at_least(1, int), default=2, help="runs of the first table; the spread is over these")
    add(
        "--sweep-requests",
        type=at_least(0, int),
        default=384,
        help="for each row of what changes, and as many before; 0: none",
    )
    add("--out", type=Path, help="a file for the results, as JSON")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All that is computed."""
    started = time.process_time()
    corpora: dict[tuple[int, float, int], Corpus] = {}
    compared = compare(args, corpora, args.requests, args.warm_up, range(args.seeds), in_turns=True)
    sweeps = {}
    for name, change in SWEEPS.items() if args.sweep_requests else ():
        changed = argparse.Namespace(**vars(args))
        for key, value in change.items():
            if key == "rate_share":
                changed.rate = args.rate * value
            else:
                setattr(changed, key, value)
        sweeps[name] = compare(changed, corpora, args.sweep_requests, args.sweep_requests, range(1), in_turns=False)
    times = compared.pop("times")
    for each in sweeps.values():
        each.pop("times")
    return {
        "benchmark": "fleet",
        "simulation": True,
        "environment": {k: v for k, v in environment().items() if k in ("commit", "date", "python")},
        "source": times.source,
        "settings": {
            k: str(v.relative_to(ROOT))
            if k == "times" and v.is_relative_to(ROOT)
            else str(v)
            if isinstance(v, Path)
            else v
            for k, v in vars(args).items()
            if k != "out"
        },
        "times": {
            "full": times.full,
            "reuse": times.reuse,
            "full_rate": 1 / (times.full + times.full_between),
            "reuse_rate": 1 / (times.reuse + times.reuse_between),
            "step": times.step,
        },
        "check": {"caches": check_caches(args.zipf), "queue": check_queue(times, args.context // args.chunk_tokens)},
        "compared": compared,
        "sweeps": sweeps,
        "rooms": rooms(args, corpora),
        "sizes": {
            model: {codec: size_of(model, codec, args.chunk_tokens).gigabytes for codec in CODECS}
            | {"deviations": size_of(model, "exact", args.chunk_tokens).deviations / args.chunk_tokens / 1000}
            for model in MODELS
        },
        "seconds": round(time.process_time() - started, 1),
    }


def compare(
    args: argparse.Namespace,
    corpora: dict[tuple[int, float, int], Corpus],
    requests: int,
    warm_up: int,
    seeds: range,
    *,
    in_turns: bool,
) -> dict[str, Any]:
    """Full recompute, reuse by chunks, and reuse in turns where that is wanted."""
    times, fleet = read_times(args.times, args.context, args.setting), fleet_of(args)
    fleet = replace(
        fleet,
        chunk_on_disk=fleet.chunk_on_disk * (1 - times.skipped),
        chunk_remote=fleet.chunk_remote * (1 - times.skipped),
    )
    which = (args.chunks, args.zipf, args.topic)
    corpus = corpora[which] if which in corpora else corpora.setdefault(which, Corpus(*which))
    remote = size_of(args.model, args.remote_codec, args.chunk_tokens)
    prices = Prices(args.gpu_hour, args.gigabyte_month, args.thousand_reads, args.busy)
    hours = precompute_hours(args.chunks, remote, times, args.context)
    found: dict[str, Any] = {"times": times, "stored_tb": args.chunks * remote.whole / 1e12, "precompute_hours": hours}
    plain = [full_recompute(fleet, times, requests, warm_up, seed) for seed in seeds]
    found["full"] = told(plain) | {"cost": answering(plain[0], prices).as_dict(), "load": fleet.rate * plain[0].busy}
    for name in ("in_turns", "by_chunks") if in_turns else ("by_chunks",):
        runs = [
            simulate(fleet, corpus, times, by_chunks=name == "by_chunks", requests=requests, warm_up=warm_up, seed=seed)
            for seed in seeds
        ]
        costs = [reusing(each, fleet, remote, prices, hours * args.changed * 365 / 12, args.chunks) for each in runs]
        found[name] = told(runs) | {
            "cost": {key: float(np.mean([cost.as_dict()[key] for cost in costs])) for key in costs[0].as_dict()},
            "load": fleet.rate * float(np.mean([each.busy for each in runs])),
            "network_gbps": float(np.mean([each.share("remote") for each in runs]))
            * fleet.shown
            * fleet.rate
            * fleet.chunk_remote
            / GBIT,
        }
    if in_turns:
        host = hit_rate(corpus, fleet.host)
        found["in_turns"]["che"] = {
            "host": host * (1 - fleet.missing),
            "disk": (max(host, hit_rate(corpus, fleet.disk)) - host) * (1 - fleet.missing),
        }
    return found


def fleet_of(args: argparse.Namespace) -> Fleet:
    """The fleet that the arguments describe."""
    for name in ("together", "missing", "changed", "busy"):
        if getattr(args, name) > 1:
            raise ValueError(f"--{name} is {getattr(args, name)}: use a share up to 1.")
    if args.context % args.chunk_tokens:
        raise ValueError(f"--context {args.context} isn't a multiple of --chunk-tokens {args.chunk_tokens}: use one.")
    here, remote = (size_of(args.model, codec, args.chunk_tokens) for codec in (args.codec, args.remote_codec))
    return Fleet(
        replicas=args.replicas,
        shown=args.context // args.chunk_tokens,
        together=args.together,
        rate=args.rate,
        answer=args.answer,
        host=min(args.chunks, int(args.host * 1e9 / here.whole)),
        disk=min(args.chunks, int(args.disk * 1e9 / here.whole)),
        chunk_on_disk=here.whole,
        chunk_remote=remote.whole,
        disk_speed=args.disk_speed * 1e9,
        network_speed=args.network * GBIT,
        latency=args.latency,
        missing=args.missing,
    )


def told(runs: list[Outcome]) -> dict[str, Any]:
    """Runs with several seeds: their mean, and the least and the most of them."""

    def figure(values: list[float]) -> dict[str, float]:
        return {"mean": float(np.mean(values)), "least": float(min(values)), "most": float(max(values))}

    return {
        "ttft_median": figure([float(np.median(run.ttft)) for run in runs]),
        "ttft_p99": figure([float(np.quantile(run.ttft, 0.99)) for run in runs]),
        "hits": {tier: figure([run.share(tier) for run in runs]) for tier in TIERS},
        "host_by_half": [float(np.mean([run.halves[half] for run in runs])) for half in (0, 1)],
        "busiest_network": max(run.network for run in runs),
        "imbalance": max(run.imbalance for run in runs),
    }


def rooms(args: argparse.Namespace, corpora: dict[tuple[int, float, int], Corpus]) -> list[dict[str, float]]:
    """Hit rates of a cache of so many GB where requests go to replicas in turns, by the approximation; and of one that all share."""
    corpus, size = corpora[args.chunks, args.zipf, args.topic], size_of(args.model, args.codec, args.chunk_tokens)
    rows = []
    for gigabytes in (64, 256, 1000, 4000, 16000):
        room = int(gigabytes * 1e9 / size.whole)
        rows.append(
            {
                "gigabytes": gigabytes,
                "alone": hit_rate(corpus, room),
                "together": hit_rate(corpus, min(args.chunks, room * args.replicas)),
            }
        )
    return rows


def at_least(least: float, kind: Any) -> Any:
    """A type of arguments: numbers from `least` on."""

    def number(text: str) -> Any:
        value = kind(text)
        if not least <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is out of range: use a number of at least {least:g}")
        return value

    number.__name__ = "number"
    return number


def above(least: float) -> Any:
    """A type of arguments: numbers above `least`."""

    def number(text: str) -> float:
        value = float(text)
        if not least < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is out of range: use a number above {least:g}")
        return value

    return number


if __name__ == "__main__":
    main()
