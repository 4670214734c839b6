"""Requests to several vLLM servers behind Ray Serve: what the router finds in host memory, against taking replicas in turns.

    python benchmarks/ray_serving.py [--replicas 3] [--requests 600] [--share 0.25] [--spread 1.25] [--out FILE]

Tiny random model on the CPU, a corpus of subjects that are asked for by Zipf's law, and host memory for a part of it (`--share`) on each replica. Chunks lie in a place
that replicas share and reach as on other machines: they have no disk of their own. At the end a server is killed. Runs in the environment with vLLM
(`make test-vllm` sets it up).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import ray
from ray import serve

from cachetune_rag import CacheTune, Document
from cachetune_ray.routing import SPREAD
from cachetune_ray.serving import ANSWERED_BY, application

sys.path.insert(0, str(Path(__file__).parent))
from common import environment, write_json

SUBJECTS, EACH, SHOWN = 16, 3, 2
"""Subjects of the corpus, chunks of each, and how many of these a request shows."""
SHARE = 0.25
"""What a replica's memory holds of the corpus: KV is large, and a corpus seldom fits."""
AT_ONCE = 9
OPTIONS = [
    "--enforce-eager",
    "--max-model-len",
    "2048",
    "--dtype",
    "float32",
    "--max-num-seqs",
    "8",
    "--no-enable-prefix-caching",
]
ROUTED, IN_TURNS = "cachetune_ray.router.ChunkRouter", "ray.serve.experimental.round_robin_router.RoundRobinRouter"


@dataclass(frozen=True)
class Place:
    """A model and a filled store.

    Attributes:
        model: its folder.
        store: URL of the shared place.
        chunks: texts by subject.
        host_budget: bytes of host memory of each replica: a part of the corpus.
    """

    model: Path
    store: str
    chunks: list[list[str]]
    host_budget: int

    @classmethod
    def make(cls, folder: Path, share: float = SHARE) -> Place:
        """Make both below a folder, with host memory for so much of the corpus on each replica."""
        root = Path(__file__).parent.parent
        sys.path[:0] = [str(root), str(root / "tests" / "vllm")]
        from models import save_tiny

        model = save_tiny("llama", folder)
        draw = random.Random(3)
        chunks = [
            ["".join(f"Fact {draw.randrange(10**6)} of subject {s}. " for _ in range(14)) for _ in range(EACH)]
            for s in range(SUBJECTS)
        ]
        store = (folder / "kv").as_uri()
        with CacheTune.from_pretrained(model, store) as engine:
            summary = engine.precompute([Document(f"s{s}", texts) for s, texts in enumerate(chunks)])
        return cls(model, store, chunks, int(summary.bytes * share))


@dataclass
class Figures:
    """What a series of requests was like.

    Attributes:
        requests, failed: how many, and how many were not answered with status 200.
        memory, elsewhere: bytes of stored rows that were read from host memory, and from other tiers.
        missed: tokens of chunks that were found nowhere, and computed.
        most_over_mean: requests that the busiest replica was answering, over the mean of all replicas: the 99th percentile over the moments at which
            a request began.
        replicas: how many answered.
        after_kill: figures of the requests since a replica was killed.
        newcomer: of the requests that the replica in its place has answered; the first of all are among them.
        in_metrics: replicas of which the application's metrics are.
        newcomer_began_with: chunks that were in its memory before its first request.
        seconds: how long they took, all together.
    """

    requests: int = 0
    failed: int = 0
    memory: int = 0
    elsewhere: int = 0
    missed: int = 0
    most_over_mean: float = 0.0
    replicas: int = 0
    by_replica: Counter[str] = field(default_factory=Counter)
    after_kill: Any = None
    newcomer: Any = None
    in_metrics: int = 0
    newcomer_began_with: int = 0
    seconds: float = 0.0

    @property
    def share(self) -> float:
        """Share of the bytes that was read from host memory."""
        return self.memory / max(1, self.memory + self.elsewhere)

    def add(self, status: int, report: dict[str, Any], replica: str) -> None:
        """Count a request."""
        self.requests += 1
        self.failed += status != 200
        read = report.get("bytes_read", {})
        self.memory += read.get("host", 0)
        self.elsewhere += sum(read.values()) - read.get("host", 0)
        self.missed += report.get("missed", 0)
        self.by_replica[replica] += 1

    def as_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        found = {each.name: getattr(self, each.name) for each in fields(self)}
        return {k: v.as_dict() if isinstance(v, Figures) else v for k, v in found.items()} | {"share": self.share}


@contextmanager
def Cluster(place: Place) -> Iterator[None]:
    """A Ray cluster of this machine."""
    del place
    ray.init(num_cpus=16, include_dashboard=False, log_to_driver=False, object_store_memory=200 << 20)
    try:
        yield
    finally:
        serve.shutdown()
        ray.shutdown()


def measure(
    place: Place, router: str, *, requests: int = 150, replicas: int = 3, kill: bool = False, spread: float = SPREAD
) -> Figures:
    """Start an application with this router and ask it.

    Args:
        place: model and store.
        router: path of the router's class.
        requests: how many; the first third fills memories and isn't counted.
        replicas: how many servers.
        kill: kill a replica behind them, in the midst of further requests.
        spread: times the mean load that a replica may have, of the router by sketches.
    """
    name = router.rpartition(".")[2]
    settings = {"store": place.store, "host_budget": place.host_budget, "least_reused": 0}
    app = application(
        str(place.model), settings, OPTIONS, replicas=replicas, router=router, spread=spread, sketch_seconds=1.0
    )
    serve.run(app, name=name, route_prefix="/")
    url = "http://127.0.0.1:8000/v1/chat/completions"
    draw = random.Random(11)
    weights = [1 / (rank + 1) for rank in range(SUBJECTS)]

    def bodies(count: int) -> list[dict[str, Any]]:
        found = []
        for _ in range(count):
            subject = draw.choices(range(SUBJECTS), weights)[0]
            shown = draw.sample(place.chunks[subject], SHOWN)
            said = "\n\n".join([*shown, f"Question {draw.randrange(10**6)}?"])
            found.append({"model": str(place.model), "max_tokens": 2, "messages": [{"role": "user", "content": said}]})
        return found

    def ask_all(count: int, known: set[str] | None = None) -> Figures:
        """Figures of further requests. With `known` replicas, those of the others are counted once more by themselves."""
        figures, begun = Figures(newcomer=None if known is None else Figures()), time.monotonic()
        with ThreadPoolExecutor(AT_ONCE) as pool:
            spans = []
            for status, report, replica, span in pool.map(lambda body: ask(url, body), bodies(count)):
                spans.append((*span, replica))
                figures.add(status, report, replica)
                if known is not None and replica not in known:
                    figures.newcomer.add(status, report, replica)
        figures.replicas, figures.seconds = len(figures.by_replica), time.monotonic() - begun
        figures.most_over_mean = imbalance(spans, replicas)
        return figures

    ask_all(requests // 3)
    figures = ask_all(requests - requests // 3)
    with urllib.request.urlopen("http://127.0.0.1:8000/metrics", timeout=60) as response:
        figures.in_metrics = len(set(re.findall(rb'vllm:prompt_tokens_total{.*replica="(\w+)"', response.read())))
    if kill:
        handle = serve.get_deployment_handle("Replica", name)
        victim = handle.server_pid.remote().result()
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(ask_all, requests // 3)
            time.sleep(1)
            os.kill(victim, 9)
            during = running.result()
        known = set(figures.by_replica)
        wait_until_noticed(name, replicas)
        wait_for(name, replicas)
        figures.newcomer_began_with = min(began_with(handle, replicas))
        figures.after_kill = ask_all(requests // 3, known)
        figures.after_kill.failed += during.failed
        figures.newcomer = figures.after_kill.newcomer
    serve.delete(name)
    return figures


def imbalance(spans: list[tuple[float, float, str]], replicas: int) -> float:
    """The busiest replica's requests over the mean, at the 99th percentile of the moments at which a request began.

    Args:
        spans: begin and end of each request, and who answered.
        replicas: how many there are.
    """
    found = []
    for moment, _, _ in spans:
        busy = Counter(replica for begin, end, replica in spans if begin <= moment < end)
        found.append(max(busy.values()) * replicas / sum(busy.values()))
    return sorted(found)[int(0.99 * (len(found) - 1))]


def ask(url: str, body: dict[str, Any]) -> tuple[int, dict[str, Any], str, tuple[float, float]]:
    """Status, report, which replica answered, and when the request began and ended."""
    begun = time.monotonic()
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=600) as response:
            said = json.load(response)
            report = (said.get("kv_transfer_params") or {}).get("cachetune") or {}
            return response.status, report, response.headers.get(ANSWERED_BY, ""), (begun, time.monotonic())
    except urllib.error.HTTPError as error:
        return error.code, {}, "", (begun, time.monotonic())


def began_with(handle: Any, replicas: int) -> list[int]:
    """Chunks that each replica read into its memory before its first request, of all that are found by asking again and again."""
    found: dict[str, int] = {}
    until = time.monotonic() + 60
    while len(found) < replicas and time.monotonic() < until:
        name, chunks = handle.warmed.remote().result()
        found[name] = chunks
    return [chunks for chunks in found.values() if chunks] or [0]


def wait_until_noticed(name: str, replicas: int) -> None:
    """Until Serve has noticed that a replica is gone, a minute at most: it may have replaced it before this first looks."""
    until = time.monotonic() + 60
    while time.monotonic() < until and running(name) >= replicas:
        time.sleep(0.2)


def running(name: str) -> int:
    """How many replicas run."""
    return int(serve.status().applications[name].deployments["Replica"].replica_states.get("RUNNING", 0))


def wait_for(name: str, replicas: int) -> None:
    """Until so many replicas run."""
    until = time.monotonic() + 900
    while time.monotonic() < until:
        if running(name) >= replicas and serve.status().applications[name].deployments["Replica"].status == "HEALTHY":
            return
        time.sleep(1)
    raise TimeoutError(f"{name} has no {replicas} replicas after 15 minutes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replicas", type=int, default=3)
    parser.add_argument("--requests", type=int, default=600, help="a third of them fills memories and isn't counted")
    parser.add_argument("--share", type=float, default=SHARE, help="share of the corpus that a replica's memory holds")
    parser.add_argument("--spread", type=float, default=SPREAD, help="times the mean load that a replica may have")
    parser.add_argument("--out", type=Path, help="file for the JSON (default: standard output)")
    given = parser.parse_args()
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        place = Place.make(Path(folder), given.share)
        with Cluster(place):
            for name, router in (("in turns", IN_TURNS), ("by sketches", ROUTED)):
                found = measure(
                    place,
                    router,
                    requests=given.requests,
                    replicas=given.replicas,
                    kill=router == ROUTED,
                    spread=given.spread,
                )
                rows[name] = found.as_dict()
                print(f"{name}: {found.share:.1%} of the bytes from host memory; {found}", file=sys.stderr, flush=True)
    settings = {"replicas": given.replicas, "requests": given.requests, "share": given.share, "at once": AT_ONCE}
    settings |= {"spread": given.spread, "subjects": SUBJECTS, "chunks each": EACH, "chunks a request": SHOWN}
    times = rows["by sketches"]["share"] / rows["in turns"]["share"]
    found_more = {"rows": rows, "from host memory, times that in turns": times}
    write_json(
        given.out,
        {"benchmark": "ray_serving", "environment": environment() | {"ray": ray.__version__, "vllm": version_of_vllm()}}
        | {"settings": settings}
        | found_more,
    )


def version_of_vllm() -> str:
    import vllm

    return str(vllm.__version__)


if __name__ == "__main__":
    main()
