"""The simulation of a fleet: nothing gets lost in it, its caches and queues are right, and its router is the one that is used."""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cachetune_ray.routing import ChunkRouting
from cachetune_ray.sketch import Sketch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import fleet as benchmark
from simulation.caches import Lru, hit_rate, latest
from simulation.checks import check_caches, check_queue
from simulation.corpus import Corpus
from simulation.measured import Arrivals, Times, read_times
from simulation.replicas import Fleet, Outcome, simulate
from simulation.routers import ByChunks
from simulation.sizes import size_of

TIMES = Times(
    full=0.5,
    reuse=0.1,
    full_between=0.05,
    reuse_between=0.05,
    tokens=64,
    step=0.005,
    at_once=16,
    skipped=0.0,
    overlaps=False,
    arrivals=(),
    source="made up",
)
FLEET = Fleet(
    replicas=4,
    shown=8,
    together=0.75,
    rate=0.5,
    answer=64,
    host=200,
    disk=800,
    chunk_on_disk=1e6,
    chunk_remote=1e6,
    disk_speed=1e9,
    network_speed=1e8,
    latency=0.01,
    missing=0.1,
)
CORPUS = Corpus(4000, 0.9, 20)


def run(fleet: Fleet = FLEET, *, by_chunks: bool = True, times: Times = TIMES, warm_up: int = 200) -> Outcome:
    return simulate(fleet, CORPUS, times, by_chunks=by_chunks, requests=400, warm_up=warm_up, seed=3)


def small(more: str = "") -> dict[str, Any]:
    found: dict[str, Any]
    options = (
        "--replicas 4 --chunks 4000 --topic 20 --requests 100 --warm-up 50 --sweep-requests 20 --host 10 --disk 30"
    )
    found = benchmark.main([*options.split(), *more.split()])
    return found


@pytest.mark.parametrize("by_chunks", [True, False])
def test_every_chunk_request_is_answered_by_a_tier_or_by_none(by_chunks: bool) -> None:
    outcome = run(by_chunks=by_chunks)
    assert sum(outcome.hits.values()) == 400 * FLEET.shown
    assert all(outcome.hits.values())
    assert outcome.share("missed") == pytest.approx(FLEET.missing, abs=0.02)
    assert len(outcome.ttft) == 400
    assert (outcome.ttft >= TIMES.reuse - 1e-9).all()


@pytest.mark.parametrize("by_chunks", [True, False])
def test_a_cache_of_the_whole_corpus_is_always_hit(by_chunks: bool) -> None:
    room = CORPUS.chunks
    assert run(replace(FLEET, host=room, disk=room, missing=0), by_chunks=by_chunks).share("host") == 1
    assert run(replace(FLEET, host=0, disk=room, missing=0), by_chunks=by_chunks).share("disk") == 1
    assert run(replace(FLEET, host=0, disk=0, missing=0), by_chunks=by_chunks).share("remote") == 1
    assert hit_rate(CORPUS, room) == 1


@pytest.mark.parametrize("overlaps", [True, False])
def test_more_bandwidth_makes_no_first_token_later(overlaps: bool) -> None:
    ttft = [
        run(replace(FLEET, network_speed=speed), by_chunks=False, times=replace(TIMES, overlaps=overlaps)).ttft
        for speed in (1e7, 1e8, 1e9, 1e10)
    ]
    for slower, faster in pairwise(ttft):
        assert (faster <= slower + 1e-9).all()
    assert ttft[-1].mean() < ttft[0].mean()


def test_rows_that_come_beside_computing_are_not_waited_for_twice() -> None:
    slow = replace(FLEET, network_speed=2e7)
    beside, behind = (run(slow, by_chunks=False, times=replace(TIMES, overlaps=overlaps)).ttft for overlaps in (1, 0))
    assert np.median(beside) < np.median(behind) <= np.median(beside) + TIMES.full


def test_routing_by_chunks_finds_more_in_memory_when_there_is_little_load() -> None:
    for seed in range(3):
        hits = [
            simulate(FLEET, CORPUS, TIMES, by_chunks=by_chunks, requests=400, warm_up=200, seed=seed).share("host")
            for by_chunks in (False, True)
        ]
        assert hits[1] > hits[0]


def test_the_approximation_of_caches_is_within_a_point_of_simulating_them() -> None:
    for row in check_caches(0.9):
        assert row["che"] == pytest.approx(row["exact"], abs=0.01), row
    assert hit_rate(Corpus(1000, 0.0, 10), 250) == pytest.approx(0.25, abs=0.001), "all alike: what there is room for"


def test_a_cache_drops_what_was_used_longest_ago() -> None:
    held = Lru(2, [1, 2, 3])
    assert (1 in held, 2 in held, 3 in held) == (True, True, False)
    assert held.use(2) is None
    assert held.use(1) is None
    assert held.use(4) == 2
    assert Lru(0).use(1) == 1
    assert latest(np.array([7, 5, 7, 9]), 3, CORPUS).tolist() == [7, 5, 9]
    assert latest(np.array([7, 5]), 4, CORPUS).tolist() == [7, 5, 0, 1]


def test_requests_ask_for_different_chunks_by_their_popularity() -> None:
    topics, drawn = CORPUS.draw(np.random.default_rng(0), 3000, 8, 0.5)
    assert all(len(set(row)) == 8 for row in drawn.tolist())
    assert (drawn[:, :4] // CORPUS.topic == topics[:, None]).all()
    asked = Counter((drawn[:, 4:] // CORPUS.topic).ravel().tolist())
    # No chunk twice in a request: the most popular topic gets a little less than its share.
    assert asked[0] / 12_000 == pytest.approx(CORPUS.shares[0], abs=0.03)
    assert asked[9] / 12_000 == pytest.approx(CORPUS.shares[9], rel=0.2)
    all_of_them = Corpus(10, 2.0, 5).draw(np.random.default_rng(0), 20, 10, 0.5)[1]
    assert {tuple(sorted(row)) for row in all_of_them.tolist()} == {tuple(range(10))}


def test_the_simulated_router_decides_as_the_real_one() -> None:
    """Beside one that is told the same by sketches. These are made large, so that no hash is taken for known wrongly."""
    rng, every, replicas = np.random.default_rng(5), 2.0, 4
    simulated = ByChunks(replicas, every)
    now, due = 0.0, 0.0
    real = ChunkRouting(clock=lambda: now)
    hashes = rng.integers(0, 1 << 63, CORPUS.chunks, dtype=np.uint64)
    memories = [Lru(60) for _ in range(replicas)]
    loads = dict.fromkeys(simulated.names, 0)
    same = 0
    for chunks in CORPUS.draw(rng, 400, 6, 0.7)[1].tolist():
        now += float(rng.exponential(0.3))
        if now >= due:
            for name, memory in zip(simulated.names, memories, strict=True):
                real.published(name, now, Sketch.of(np.tile(hashes[list(memory)], 64)).to_bytes())
            due = now + every
        loads = {name: int(rng.integers(0, 4)) for name in loads}
        wanted = real.rank(hashes[chunks], loads)[0]
        chosen = simulated.choose(now, chunks, loads)
        same += simulated.names[chosen] == wanted
        real.sent(simulated.names[chosen], hashes[chunks])
        for chunk in chunks:
            simulated.used(chosen, chunk, memories[chosen].use(chunk))
    assert same == 400


def test_sizes_are_those_of_the_store() -> None:
    llama = size_of("llama-3.1-8b", "exact", 512)
    assert llama.rows == 512 * 128 * 1024
    assert llama.gigabytes == pytest.approx(131.072)
    assert llama.reads == 33
    assert size_of("llama-3.1-8b", "int4", 512).reads == 17
    assert size_of("smollm2-135m", "exact", 512).gigabytes == pytest.approx(30 * 3 * 64 * 2 * 2 / 1000)


def test_the_queue_is_checked_with_requests_that_come_when_the_measured_ones_came() -> None:
    came = (0.0, 0.5, 9.0)
    arrivals = (Arrivals(True, 1.0, came, 1.5, 2.5), Arrivals(False, 1.0, came, 0.75, 1.0))
    times = replace(TIMES, full=2.0, full_between=1.0, reuse=0.5, reuse_between=0.25, arrivals=arrivals)
    full, reuse = check_queue(times, 8)
    assert (full["median"], full["p99"]) == (2.0, 4.5)  # the second one waits for 2.5 s
    assert (reuse["median"], reuse["p99"]) == (0.5, 0.75)
    assert (full["measured_median"], full["measured_p99"]) == (1.5, 2.5)


def test_the_time_of_a_step_is_that_of_the_nearest_context_with_gaps(tmp_path: Path) -> None:
    content = json.loads((benchmark.ROOT / "benchmarks/results/serving-h200.json").read_text())
    groups, setting = content["groups"], "default 0.15"
    path = tmp_path / "serving.json"
    gaps = groups.pop(f"reuse/gaps/16384/{setting}")
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"has no 'reuse/gaps/4096/default 0.15': measure the phase gaps"):
        read_times(path, 4096, setting)
    for context, step in ((8192, 0.5), (32768, 0.25)):
        groups[f"reuse/gaps/{context}/{setting}"] = gaps | {"gaps": {"p50": step}}
    path.write_text(json.dumps(content))
    assert [read_times(path, context, setting).step for context in (4096, 32768)] == [0.5, 0.25]


def test_the_command_tells_what_it_found_and_from_what(capsys: pytest.CaptureFixture[str]) -> None:
    result = small()
    assert "serving-h200.json" in result["source"]
    assert "NVIDIA H200" in result["source"]
    assert result["simulation"] is True
    for each in [result["compared"], *result["sweeps"].values()]:
        assert sum(tier["mean"] for tier in each["by_chunks"]["hits"].values()) == pytest.approx(1)
        cost = each["by_chunks"]["cost"]
        assert cost["total"] == pytest.approx(sum(cost[part] for part in ("gpu", "reads", "storage", "precompute")))
    printed = capsys.readouterr().out
    assert all(f"| {name} |" in printed for name in benchmark.SWEEPS)
    assert small("--sweep-requests 0")["compared"] == result["compared"], "seeds are fixed"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--replicas 0", "--replicas: 0 is out of range: use a number of at least 1"),
        ("--network 0", "--network: 0 is out of range: use a number above 0"),
        ("--network inf", "--network: inf is out of range"),
        ("--rate nan", "--rate: nan is out of range"),
        ("--together 1.5", "--together is 1.5: use a share up to 1"),
        ("--chunks 1050", "1050 chunks can't be divided into topics of 100"),
        ("--context 8192", "has no 'vllm/alone/8192': use a context and setting of 16384/default 0.05"),
        ("--setting probe", "has no 'reuse/alone/16384/probe'"),
        ("--chunk-tokens 500", "--context 16384 isn't a multiple of --chunk-tokens 500"),
        ("--times nowhere.json", "nowhere.json is not there"),
        ("--disk 1e6", "use fewer replicas, smaller caches or larger chunks"),
        ("--zipf 10", "zipf is 10"),
        ("--codec zip", "invalid choice: 'zip'"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(options: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(options.split())
    assert told in capsys.readouterr().err
