"""The fleet at work: requests arrive, are routed, read what they need and are computed."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from simulation.caches import Lru, latest
from simulation.corpus import Chunks, Corpus
from simulation.measured import Times
from simulation.routers import ByChunks, InTurns

HOST, DISK, REMOTE, MISSED = TIERS = ("host", "disk", "remote", "missed")
_MOST_HELD = 20_000_000
_FILLINGS = 12


@dataclass(frozen=True)
class Fleet:
    """What is simulated.

    Attributes:
        replicas: how many, each with one GPU.
        shown: chunks that a request shows.
        together: share of them that are of one topic.
        rate: requests a second that each replica gets on average.
        answer: tokens of an answer.
        host, disk: chunks for which each replica has room.
        chunk_on_disk, chunk_remote: bytes that are read of a chunk.
        disk_speed, network_speed: bytes a second, of each replica.
        latency: seconds until the remote tier begins to answer.
        missing: share of chunk requests whose chunk is nowhere, since its document has just changed.
        sketch_seconds: how often replicas publish what they have in memory.
    """

    replicas: int
    shown: int
    together: float
    rate: float
    answer: int
    host: int
    disk: int
    chunk_on_disk: float
    chunk_remote: float
    disk_speed: float
    network_speed: float
    latency: float
    missing: float
    sketch_seconds: float = 2.0

    def __post_init__(self) -> None:
        if self.replicas * (self.host + self.disk) > _MOST_HELD:
            held = self.replicas * (self.host + self.disk)
            raise ValueError(
                f"The caches would hold {held:,} chunks, more than the {_MOST_HELD:,} that are simulated: use fewer replicas, smaller caches or larger chunks."
            )


@dataclass
class Outcome:
    """What became of the requests that count.

    Attributes:
        ttft: seconds to the first token of each.
        hits: chunk requests by where the chunk was; `missed`: nowhere.
        halves: share of chunk requests that host memory answered, in the first and in the second half of the requests.
        busy: seconds of a GPU that a request took on average.
        network: how busy the busiest replica's network was, 1 = all the time.
        imbalance: requests of the busiest replica against the mean.
    """

    ttft: np.ndarray
    hits: dict[str, int]
    halves: tuple[float, float]
    busy: float
    network: float
    imbalance: float

    def share(self, tier: str) -> float:
        """Of all chunk requests, those that this tier answered."""
        return self.hits[tier] / max(1, sum(self.hits.values()))


@dataclass
class _Replica:
    host: Lru
    disk: Lru
    disk_free: float = 0.0
    network_free: float = 0.0
    gpu_free: float = 0.0
    network_busy: float = 0.0
    answered: int = 0


@dataclass
class _Traffic:
    """Requests with their times of arrival, the topic of each, its chunks, and which of these are missing."""

    at: np.ndarray
    topics: Chunks
    chunks: Chunks
    missing: np.ndarray = field(repr=False)


def full_recompute(
    fleet: Fleet, times: Times, requests: int, warm_up: int, seed: int, at: np.ndarray | None = None
) -> Outcome:
    """The same requests at replicas that compute every prompt in full, in turns."""
    arrivals = _arrivals(fleet, np.random.default_rng(seed), warm_up + requests) if at is None else at
    free, ttft = [0.0] * fleet.replicas, np.empty(len(arrivals))
    between = times.answer(fleet.answer, full=True)
    for number, now in enumerate(arrivals.tolist()):
        done = max(now, free[number % fleet.replicas]) + times.full
        free[number % fleet.replicas] = done + between
        ttft[number] = done - now
    hits = dict.fromkeys(TIERS, 0) | {MISSED: requests * fleet.shown}
    return Outcome(ttft[warm_up:], hits, (0.0, 0.0), times.full + between, 0.0, 1.0)


def simulate(
    fleet: Fleet,
    corpus: Corpus,
    times: Times,
    *,
    by_chunks: bool,
    requests: int,
    warm_up: int,
    seed: int,
    at: np.ndarray | None = None,
) -> Outcome:
    """Answer `warm_up` requests that don't count, and `requests` that do. They come at random times (Poisson), or `at` these."""
    rng = np.random.default_rng(seed)
    traffic = _traffic(fleet, corpus, rng, warm_up + requests, at)
    replicas = _filled(fleet, corpus, seed + 1, by_chunks)
    router = ByChunks(fleet.replicas, fleet.sketch_seconds) if by_chunks else InTurns(fleet.replicas)
    for number, replica in enumerate(replicas):
        for chunk in replica.host:
            router.used(number, chunk, None)
    names = [f"{number:04}" for number in range(fleet.replicas)]
    loads, ends = dict.fromkeys(names, 0), []
    ttft, busy = np.empty(requests), 0.0
    hits, half = dict.fromkeys(TIERS, 0), 0
    between = times.answer(fleet.answer, full=False)
    missing = traffic.missing
    for number, now in enumerate(traffic.at.tolist()):
        if number == warm_up:
            for replica in replicas:
                replica.network_busy, replica.answered = 0.0, 0
            began = now
        while ends and ends[0][0] <= now:
            loads[heapq.heappop(ends)[1]] -= 1
        chunks = traffic.chunks[number].tolist()
        chosen = router.choose(now, chunks, loads)
        replica = replicas[chosen]
        found = _use(replica, router, chosen, chunks, missing[number] if fleet.missing else None)
        loaded = _load(fleet, replica, now, found)
        compute = times.prefill(found[MISSED] / fleet.shown)
        ready = max(now, replica.gpu_free)
        done = max(ready + compute, loaded) if times.overlaps else max(ready, loaded) + compute
        replica.gpu_free = done + between
        replica.answered += 1
        loads[names[chosen]] += 1
        heapq.heappush(ends, (done + fleet.answer * times.step, names[chosen]))
        if number >= warm_up:
            ttft[number - warm_up] = done - now
            busy += compute + between
            for tier in TIERS:
                hits[tier] += found[tier]
            if number < warm_up + requests // 2:
                half += found[HOST]
    first = (requests // 2) * fleet.shown
    return Outcome(
        ttft,
        hits,
        (half / max(1, first), (hits[HOST] - half) / max(1, requests * fleet.shown - first)),
        busy / requests,
        max(replica.network_busy for replica in replicas) / max(1e-9, float(traffic.at[-1]) - began),
        max(replica.answered for replica in replicas) * fleet.replicas / requests,
    )


def _arrivals(fleet: Fleet, rng: np.random.Generator, requests: int) -> np.ndarray:
    return np.cumsum(rng.exponential(1 / (fleet.rate * fleet.replicas), requests))


def _traffic(fleet: Fleet, corpus: Corpus, rng: np.random.Generator, requests: int, at: np.ndarray | None) -> _Traffic:
    at = _arrivals(fleet, rng, requests) if at is None else at
    topics, chunks = corpus.draw(rng, requests, fleet.shown, fleet.together)
    return _Traffic(at, topics, chunks, rng.random(chunks.shape) < fleet.missing)


def _use(
    replica: _Replica, router: ByChunks | InTurns, number: int, chunks: list[int], missing: np.ndarray | None
) -> dict[str, int]:
    """Find chunks, and keep them in host memory and in the folder. Counts by where they were."""
    found = dict.fromkeys(TIERS, 0)
    lost = missing.tolist() if missing is not None else None
    for at, chunk in enumerate(chunks):
        if lost is not None and lost[at]:
            found[MISSED] += 1
        elif chunk in replica.host:
            found[HOST] += 1
        elif chunk in replica.disk:
            found[DISK] += 1
        else:
            found[REMOTE] += 1
        replica.disk.use(chunk)
        router.used(number, chunk, replica.host.use(chunk))
    return found


def _load(fleet: Fleet, replica: _Replica, now: float, found: dict[str, int]) -> float:
    """When all rows are there. A replica's disk and network bring what was asked for first first."""
    loaded = now
    if found[DISK]:
        replica.disk_free = max(now, replica.disk_free) + found[DISK] * fleet.chunk_on_disk / fleet.disk_speed
        loaded = replica.disk_free
    if found[REMOTE]:
        took = found[REMOTE] * fleet.chunk_remote / fleet.network_speed
        replica.network_free = max(now, replica.network_free) + took
        replica.network_busy += took
        loaded = max(loaded, replica.network_free + fleet.latency)
    return loaded


def _filled(fleet: Fleet, corpus: Corpus, seed: int, by_chunks: bool) -> list[_Replica]:
    """Replicas whose caches are as if requests had come for long."""
    room = max(fleet.host, fleet.disk)
    held = _held(corpus, fleet.replicas, room, fleet.shown, fleet.together, by_chunks, seed)
    return [_Replica(Lru(fleet.host, mine), Lru(fleet.disk, mine)) for mine in held]


@lru_cache(maxsize=1)
def _held(
    corpus: Corpus, replicas: int, room: int, shown: int, together: float, by_chunks: bool, seed: int
) -> list[Chunks]:
    """The chunks that each replica has used last, latest first.

    In turns, each got any requests. By chunks, it is as if those of a topic had always gone to the same replica, or to as many as they need; requests that don't
    count then put in place what the router really does.
    """
    rng = np.random.default_rng(seed)
    used: list[list[Chunks]] = [[] for _ in range(replicas)]
    short = set(range(replicas)) if room else set()
    each = max(64, room // shown) * replicas
    for _ in range(_FILLINGS):
        if not short:
            break
        topics, chunks = corpus.draw(rng, min(each, 1_600_000 // shown), shown, together)
        homes = rng.integers(0, replicas, len(topics))
        if by_chunks:
            wide = np.ceil(corpus.shares[topics] * replicas).astype(np.int64)
            homes = (topics + homes % wide) % replicas
        for number in list(short):
            used[number].append(chunks[homes == number].ravel())
            if len(np.unique(np.concatenate(used[number]))) >= room:
                short.discard(number)
    nothing = np.empty(0, np.int64)
    return [latest(np.concatenate(mine) if mine else nothing, room, corpus) for mine in used]
