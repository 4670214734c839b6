"""Requests to several vLLM servers behind Ray Serve: what the router finds in host memory, against taking replicas in turns.

    python benchmarks/ray_serving.py [--replicas 3] [--requests 200]

Tiny random model on the CPU, a corpus of subjects that are asked for by Zipf's law, and host memory for a part of it on each replica. Runs in the
environment with vLLM (`make test-vllm` sets it up).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray import serve

from cachetune_rag import CacheTune, Document
from cachetune_ray.serving import ANSWERED_BY, application

SUBJECTS, EACH, SHOWN = 16, 3, 2
"""Subjects of the corpus, chunks of each, and how many of these a request shows."""
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
        model, store: folders.
        chunks: texts by subject.
        host_budget: bytes of host memory of each replica: a part of the corpus.
    """

    model: Path
    store: Path
    chunks: list[list[str]]
    host_budget: int

    @classmethod
    def make(cls, folder: Path) -> Place:
        """Make both below a folder."""
        root = Path(__file__).parent.parent
        sys.path[:0] = [str(root), str(root / "tests" / "vllm")]
        from models import save_tiny

        model = save_tiny("llama", folder)
        draw = random.Random(3)
        chunks = [
            ["".join(f"Fact {draw.randrange(10**6)} of subject {s}. " for _ in range(14)) for _ in range(EACH)]
            for s in range(SUBJECTS)
        ]
        with CacheTune.from_pretrained(model, folder / "kv") as engine:
            summary = engine.precompute([Document(f"s{s}", texts) for s, texts in enumerate(chunks)])
        return cls(model, folder / "kv", chunks, int(summary.bytes * 0.4))


@dataclass
class Figures:
    """What a series of requests was like.

    Attributes:
        requests, failed: how many, and how many were not answered with status 200.
        memory, elsewhere: bytes of stored rows that were read from host memory, and from other tiers.
        most_over_mean: requests that the busiest replica was answering, over the mean of all replicas: the 99th percentile over the moments at which
            a request began.
        replicas: how many answered.
        after_kill: figures of the requests since a replica was killed.
        newcomer_answered: requests that the replica in its place has answered.
    """

    requests: int = 0
    failed: int = 0
    memory: int = 0
    elsewhere: int = 0
    most_over_mean: float = 0.0
    replicas: int = 0
    by_replica: Counter[str] = field(default_factory=Counter)
    after_kill: Any = None
    newcomer_answered: int = 0

    @property
    def share(self) -> float:
        """Share of the bytes that was read from host memory."""
        return self.memory / max(1, self.memory + self.elsewhere)


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


def measure(place: Place, router: str, *, requests: int = 150, replicas: int = 3, kill: bool = False) -> Figures:
    """Start an application with this router and ask it.

    Args:
        place: model and store.
        router: path of the router's class.
        requests: how many; the first third fills memories and isn't counted.
        replicas: how many servers.
        kill: kill a replica behind them, in the midst of further requests.
    """
    name = router.rpartition(".")[2]
    settings = {"store": str(place.store), "host_budget": place.host_budget, "least_reused": 0}
    app = application(str(place.model), settings, OPTIONS, replicas=replicas, router=router, sketch_seconds=1.0)
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

    def ask_all(count: int) -> Figures:
        figures = Figures()
        with ThreadPoolExecutor(AT_ONCE) as pool:
            spans = []
            for status, report, replica, span in pool.map(lambda body: ask(url, body), bodies(count)):
                spans.append((*span, replica))
                figures.requests += 1
                figures.failed += status != 200
                read = report.get("bytes_read", {})
                figures.memory += read.get("host", 0)
                figures.elsewhere += sum(read.values()) - read.get("host", 0)
                figures.by_replica[replica] += 1
        figures.replicas = len(figures.by_replica)
        figures.most_over_mean = imbalance(spans, replicas)
        return figures

    ask_all(requests // 3)
    figures = ask_all(requests - requests // 3)
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
        figures.after_kill = ask_all(requests // 3)
        figures.after_kill.failed += during.failed
        fresh = set(figures.after_kill.by_replica) - known
        figures.newcomer_answered = sum(figures.after_kill.by_replica[each] for each in fresh)
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
    parser.add_argument("--requests", type=int, default=150)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Place.make(Path(folder))
        with Cluster(place):
            for router in (IN_TURNS, ROUTED):
                found = measure(place, router, requests=given.requests, replicas=given.replicas, kill=router == ROUTED)
                print(router, f"{found.share:.1%} of the bytes from host memory;", found, flush=True)


if __name__ == "__main__":
    main()
