"""Does the simulation say what was measured, and the approximation of caches what simulating them says?"""

from __future__ import annotations

from typing import Any

import numpy as np

from simulation.caches import Lru, hit_rate
from simulation.corpus import Corpus
from simulation.measured import Times
from simulation.replicas import Fleet, full_recompute, simulate

_CHUNKS, _TOPIC, _ROOMS = 20_000, 100, (500, 2000, 8000)


def check_caches(zipf: float) -> list[dict[str, float]]:
    """Hit rates of caches of a small corpus, by both ways."""
    rows = []
    corpus = Corpus(_CHUNKS, zipf, _TOPIC)
    drawn = corpus.draw(np.random.default_rng(0), 12_000, 10, 0.0)[1].ravel().tolist()
    for room in _ROOMS:
        cache, hits = Lru(room), 0
        for number, chunk in enumerate(drawn):
            hits += number >= len(drawn) // 2 and chunk in cache
            cache.use(chunk)
        exact = hits / (len(drawn) - len(drawn) // 2)
        rows.append({"chunks": _CHUNKS, "room": room, "exact": exact, "che": hit_rate(corpus, room)})
    return rows


def check_queue(times: Times, shown: int) -> list[dict[str, Any]]:
    """One replica that has all chunks in host memory, asked at the times at which the measured one was asked."""
    rows = []
    corpus = Corpus(shown * 2, 0.0, 1)
    for measured in times.arrivals:
        fleet = Fleet(
            replicas=1,
            shown=shown,
            together=0.0,
            rate=measured.rate,
            answer=times.tokens,
            host=corpus.chunks,
            disk=0,
            chunk_on_disk=0,
            chunk_remote=0,
            disk_speed=1,
            network_speed=1,
            latency=0,
            missing=0,
        )
        at, requests = np.array(measured.at), len(measured.at)
        if measured.full:
            run = full_recompute(fleet, times, requests, 0, 0, at)
        else:
            run = simulate(fleet, corpus, times, by_chunks=False, requests=requests, warm_up=0, seed=0, at=at)
        rows.append(
            {
                "full": measured.full,
                "rate": measured.rate,
                "measured_median": measured.median,
                "measured_p99": measured.p99,
                "median": float(np.median(run.ttft)),
                # As the benchmark of serving takes it: of fewer than a hundred requests, the slowest.
                "p99": float(np.quantile(run.ttft, 0.99, method="higher")),
            }
        )
    return rows
