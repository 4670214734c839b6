"""Ways in which requests arrive, and what is measured of each."""

from __future__ import annotations

import asyncio
import itertools
import random
import statistics
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from common import spread

from served.targets import Answer, Reuse, Target

Ids = list[int]

STEADY = 3
"""Prompts a client that it takes at least to say what a server gives while it is saturated."""
BOUND = 1.0
"""Seconds within which 95% of all first tokens have to come, where it is asked how many requests per second a server takes."""
PARTS = (0.2, 0.3, 0.4, 0.6, 0.8, 0.9, 1.0)
"""Parts of the saturated requests per second that are tried for it."""


async def alone(target: Target, prompts: Sequence[Ids], reuse: Reuse | None, warm: int = 2) -> dict[str, Any]:
    """One request at a time, one token each: time to first token. The first `warm` of them don't count."""
    return first_tokens([await target.ask(ids, 1, reuse) for ids in prompts][warm:])


async def paused(
    target: Target, prompts: Sequence[Ids], reuse: Reuse | None, pause: float, warm: int = 2
) -> dict[str, Any]:
    """As `alone`, but `pause` seconds pass before each request, in which the server has nothing to do."""
    answers = []
    for ids in prompts:
        if pause:
            await asyncio.sleep(pause)
        answers.append(await target.ask(ids, 1, reuse))
    return first_tokens(answers[warm:])


async def both_ways(target: Target, prompts: Sequence[Ids], reuse: bool, warm: int = 2) -> dict[str, Any]:
    """One request at a time, one token each, and nothing in vLLM's prefix cache: time to first token. The first `warm` prompts don't count.

    With `reuse`, each prompt is asked without reuse as well, right before or behind: a server that shares its machine is slower at one time than at another,
    so what is compared is measured in turns, in one server.
    """
    ways: list[Reuse | None] = [{}, {"reuse": False}] if reuse else [None]
    answers = await in_turn(target, prompts, ways, target.forget)
    found = first_tokens(answers[0][warm:])
    return found if not reuse else found | {"without_reuse": spread([a.ttft for a in answers[1][warm:]])}


async def in_turn(
    target: Target, prompts: Sequence[Ids], ways: Sequence[Reuse | None], before: Callable[[], Awaitable[None]]
) -> list[list[Answer]]:
    """Each prompt is asked in all ways, one request at a time, one token each; every other prompt the other way round. `before` is awaited before each request.

    Returns: the answers to all prompts, by way.
    """
    answers: list[list[Answer]] = [[] for _ in ways]
    for number, ids in enumerate(prompts):
        order = list(enumerate(ways))
        for way, asked in reversed(order) if number % 2 else order:
            await before()
            answers[way].append(await target.ask(ids, 1, asked))
    return answers


async def closed(
    target: Target, prompts: Sequence[Ids], reuse: Reuse | None, tokens: int, at_once: int
) -> dict[str, Any]:
    """`at_once` clients, each of which asks again as soon as it has its answer: requests per second of a saturated server.

    "requests_per_second" has all of them. In its first and last moments the server isn't saturated: nothing is answered yet, and no prompts
    are left. "steady_per_second" has those that were answered between the end of the first answer and the moment when the last prompt
    was asked. Answers may end in bunches of as many as there are clients, so it is None for fewer than `STEADY` prompts a client.
    """
    waiting = list(reversed(prompts))
    answers: list[Answer] = []
    ends: list[float] = []
    last_asked = started = time.perf_counter()

    async def client() -> None:
        nonlocal last_asked
        while waiting:
            ids = waiting.pop()
            last_asked = time.perf_counter()
            answers.append(await target.ask(ids, tokens, reuse))
            ends.append(time.perf_counter())

    await asyncio.gather(*(client() for _ in range(at_once)))
    answered = sum(ends[0] < end <= last_asked for end in ends)
    return {
        "requests_per_second": len(prompts) / (time.perf_counter() - started),
        "steady_per_second": answered / (last_asked - ends[0]) if len(prompts) >= STEADY * at_once else None,
        **_summary(answers),
    }


def arrival_times(count: int, rate: float, seed: str) -> list[float]:
    """When each of `count` requests arrives, in seconds behind the first one, if they come independently of each other (Poisson).

    The pauses are drawn, and then stretched so that exactly `rate` requests a second arrive: the rate of 48 that are only drawn is off by a seventh, as a
    rule. The same seed gives the same times, closer together at a higher rate.
    """
    source = random.Random(seed)
    drawn = list(itertools.accumulate((source.expovariate(1) for _ in range(count - 1)), initial=0.0))
    return [at * (count - 1) / (rate * drawn[-1]) for at in drawn] if count > 1 else drawn


async def open_loop(
    target: Target, prompts: Sequence[Ids], reuse: Reuse | None, tokens: int, rate: float, seed: str
) -> dict[str, Any]:
    """Requests arrive at `rate` a second, independently of each other (Poisson), whether or not the server keeps up. "arrived" says when each of them came."""
    started = time.perf_counter()
    tasks, arrived = [], []
    for ids, at in zip(prompts, arrival_times(len(prompts), rate, seed), strict=True):
        await asyncio.sleep(max(0.0, started + at - time.perf_counter()))
        arrived.append(round(time.perf_counter() - started, 6))
        tasks.append(asyncio.create_task(target.ask(ids, tokens, reuse)))
    answers = await asyncio.gather(*tasks)
    return {"rate": rate, "arrived": arrived, "seconds": time.perf_counter() - started, **_summary(answers)}


async def most_within(at: Callable[[float], Awaitable[dict[str, Any]]]) -> dict[str, Any]:
    """The highest rate at which the p95 of the time to first token keeps `BOUND`, found by halving the range of rates.

    Args:
        at: an open loop at a part of the saturated rate.

    Returns: what was measured at that rate (only "tries" if even the lowest one is too high), and "tries": rate, part and p95 of each.
    """
    best: dict[str, Any] = {}
    tries: list[dict[str, float]] = []
    low, high = 0, len(PARTS)
    while low < high:
        middle = (low + high) // 2
        found = await at(PARTS[middle])
        tries.append({"part": PARTS[middle], "rate": found["rate"], "p95": found["ttft"]["p95"]})
        if found["ttft"]["p95"] <= BOUND:
            best, low = found, middle + 1
        else:
            high = middle
    return best | {"tries": tries}


async def while_running(
    target: Target, running: Sequence[Ids], arriving: Sequence[Ids], reuse: Reuse | None, tokens: int, pause: float
) -> dict[str, Any]:
    """Some requests are being answered while prompts arrive, one every `pause` seconds: the gaps between tokens of the former."""
    tasks = [asyncio.create_task(target.ask(ids, tokens, {"reuse": False} if reuse else None)) for ids in running]
    await asyncio.sleep(pause)
    others = []
    for ids in arriving:
        others.append(asyncio.create_task(target.ask(ids, 1, reuse)))
        await asyncio.sleep(pause)
    answers = await asyncio.gather(*others)
    running_answers = await asyncio.gather(*tasks)
    gaps = sorted(gap for answer in running_answers for gap in answer.gaps)
    return {"gaps": percentiles(gaps), "arriving": _summary(answers)}


def _summary(answers: Sequence[Answer]) -> dict[str, Any]:
    gaps = [gap for answer in answers for gap in answer.gaps]
    return {
        "requests": len(answers),
        "ttft": percentiles([a.ttft for a in answers]),
        "between_tokens": percentiles(gaps) if gaps else None,
        **_reports(answers),
    }


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """The median, what 95% and 99% of the values are at most, and the largest."""
    ordered = sorted(values)

    def at(share: float) -> float:
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    return {"p50": statistics.median(ordered), "p95": at(0.95), "p99": at(0.99), "most": ordered[-1]}


def _reports(answers: Sequence[Answer]) -> dict[str, Any]:
    """Mean tokens of each kind, why requests were left to vLLM, and where the time of those went that were not: the medians of each part of it."""
    told = [a.report for a in answers if a.report]
    if not told:
        return {}
    means = {n: statistics.mean(r.get(n, 0) for r in told) for n in ("reused", "recomputed", "missed")}
    left = dict(Counter(r["left"] for r in told if "left" in r))
    medians = {name: statistics.median(seconds) for name, seconds in _timings(answers).items()}
    return {"tokens": means, "left": left, **({"timings": medians} if medians else {}), "last_report": told[-1]}


def first_tokens(answers: Sequence[Answer]) -> dict[str, Any]:
    """What is said of requests that came one at a time. "timings_of_each" has where the time of each went that wasn't left to vLLM."""
    of_each = {name: [round(each, 5) for each in seconds] for name, seconds in _timings(answers).items()}
    return {"ttft": spread([a.ttft for a in answers]), **_reports(answers)} | (
        {"timings_of_each": of_each} if of_each else {}
    )


def _timings(answers: Sequence[Answer]) -> dict[str, list[float]]:
    """Where the times to first token went, in seconds, of each request that wasn't left to vLLM: the engine's phases (`Report.timings`), all of the engine, and what passed before
    and behind it."""
    each = [
        {**a.report["timings"], "engine": a.report["ttft"], "around": a.ttft - a.report["ttft"]}
        for a in answers
        if "timings" in a.report
    ]
    names = dict.fromkeys(name for timings in each for name in timings)
    return {name: [timings.get(name, 0.0) for timings in each] for name in names}
