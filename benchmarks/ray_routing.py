"""The requests of `ray_serving.py` without servers: what replicas' memories hit in turns and by sketches, for other sizes of corpus and memory.

    python benchmarks/ray_routing.py [--subjects 16 64 256] [--shares 0.15 0.25 0.4] [--spread 1.25]

The choice of a replica is the code of `cachetune_ray` itself. Each memory evicts the chunk that was used longest ago. Replicas publish their sketches every ten
requests, which is a second of `ray_serving.py`.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter, OrderedDict, deque

import numpy as np

from cachetune_ray.routing import SPREAD, ChunkRouting
from cachetune_ray.sketch import RATE, Sketch

EACH, SHOWN, AT_ONCE, A_SECOND = 3, 2, 9, 10
SPACING = 7919 * RATE
"""Between the hashes of two chunks, of which each has one here."""


def share_from_memory(
    subjects: int,
    share: float,
    requests: int,
    *,
    routed: bool,
    seed: int,
    replicas: int = 3,
    zipf: float = 1.0,
    spread: float = SPREAD,
) -> tuple[float, float]:
    """Of the last two thirds of the requests: share of the chunks that are found in memory, and p99 of the busiest replica's load over the mean.

    Args:
        subjects: how many the corpus has, with `EACH` chunks.
        share: part of the corpus that a replica's memory holds.
        requests: how many.
        routed: by sketches; otherwise in turns.
        seed: which requests.
        replicas: how many.
        zipf: exponent of the law by which subjects are asked for.
        spread: see `ChunkRouting`.
    """
    draw, now = random.Random(seed), 0.0
    weights = [1 / (rank + 1) ** zipf for rank in range(subjects)]
    routing = ChunkRouting(spread=spread, clock=lambda: now)
    memories: dict[str, OrderedDict[int, None]] = {f"replica {i}": OrderedDict() for i in range(replicas)}
    names, loads = list(memories), Counter[str]()
    answering: deque[str] = deque()
    hits = asked = 0
    busiest: list[float] = []
    for number in range(requests):
        now = number / A_SECOND
        if number % A_SECOND == 0:
            for name, memory in memories.items():
                routing.published(name, number, Sketch.of(np.array(sorted(memory), dtype=np.uint64)).to_bytes())
        subject = draw.choices(range(subjects), weights)[0]
        chunks = [(subject * EACH + place + 1) * SPACING for place in draw.sample(range(EACH), SHOWN)]
        samples = np.array(sorted(chunks), dtype=np.uint64)
        while len(answering) >= AT_ONCE:  # one of those that began first is done
            place = draw.randrange(min(3, len(answering)))
            loads[answering[place]] -= 1
            del answering[place]
        if routed:
            name = routing.rank(samples, {each: loads[each] for each in names})[0]
            routing.sent(name, samples)
        else:
            name = names[number % replicas]
        loads[name] += 1
        answering.append(name)
        if number >= requests // 3:
            busiest.append(max(loads.values()) * replicas / sum(loads.values()))
        for chunk in chunks:
            if number >= requests // 3:
                hits, asked = hits + (chunk in memories[name]), asked + 1
            memories[name][chunk] = None
            memories[name].move_to_end(chunk)
            while len(memories[name]) > int(subjects * EACH * share):
                memories[name].popitem(last=False)
    return hits / asked, float(np.quantile(busiest, 0.99))


def main() -> None:
    """Print a table: shares in turns and by sketches, their quotient, and p99 of the busiest replica's load over the mean, by sketches."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--subjects", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.15, 0.25, 0.4])
    parser.add_argument("--requests", type=int, default=1800)
    parser.add_argument("--zipf", type=float, default=1.0)
    parser.add_argument("--spread", type=float, default=SPREAD)
    parser.add_argument("--seeds", type=int, default=5)
    given = parser.parse_args()
    print("| chunks | " + " | ".join(f"{share:.0%}" for share in given.shares) + " |")
    print("| --- |" + " --- |" * len(given.shares))
    for subjects in given.subjects:
        cells = []
        for share in given.shares:
            found = {
                by: [
                    share_from_memory(
                        subjects, share, given.requests, routed=by, seed=seed, zipf=given.zipf, spread=given.spread
                    )
                    for seed in range(given.seeds)
                ]
                for by in (False, True)
            }
            (turns, _), (routed, busiest) = (
                (sum(column) / given.seeds for column in zip(*found[by], strict=True)) for by in (False, True)
            )
            cells.append(f"{turns:.0%}, {routed:.0%} ({routed / turns:.1f}x, {busiest:.2f})")
        print(f"| {subjects * EACH} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
