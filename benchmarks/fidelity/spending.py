"""Whether recomputing could be divided better among requests with a bound on KL: from the rows of `benchmarks/bound.py`.

Nothing is measured here. Each way is tried at many costs, from strict to loose, and is held against the present one, and against one fixed ratio for all, where both spend
as much on average.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from cachetune_rag.selection.bound import Bound
from cachetune_rag.selection.predictor import FEWEST_PROMPTS, Observation, Predictor

from . import bounds
from .bounds import BY_LAST, SHAKEN_LAST, SIGN, Request, misses_at
from .cells import number
from .measures import ratio_of_sums

Numbers = NDArray[np.float64]

MAX_KL = (0.01, 0.015, 0.02, 0.03, 0.05, 0.07, 0.1)
COSTS = tuple(np.geomspace(0.03, 0.5, 15).tolist())
MISSES = (0.05, 0.2)
"""Costs at which fewer or more requests than these shares are over the bound at the fixed ratio are left out: too few to divide, or a bound that nobody would ask for."""
SHARES = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.985)
PRICES = tuple(np.geomspace(0.03, 30, 40).tolist())
UNLIKELY = 0.5
"""At a price, no request is given a ratio at which it is more likely than this to be over the bound."""
TINY = 1e-6
"""A KL below this counts as this, where logarithms are taken."""

Curve = list[tuple[Numbers, Numbers]]
"""For each setting of a way: whether each request is over the bound, and what is spent on it; means over divisions."""

PRESENT = "level, by what all watched tokens see (the present way)"
WAYS = {
    PRESENT: ("level", SIGN),
    "level, by what the last token sees": ("level", BY_LAST),
    "price, by what all watched tokens see": ("price", SIGN),
    "price, by what the last token sees": ("price", BY_LAST),
    "level, by shaking": ("level", SHAKEN_LAST),
    "price, by shaking": ("price", SHAKEN_LAST),
}
"""How it is spent, and by which sign. A sign that rows don't have is left out."""


def curves(requests: Sequence[Request], way: str) -> list[Curve]:
    """What a way does at each bound of `MAX_KL`, for each of its settings. Requests are predicted by what was fitted to others."""
    how, sign = WAYS[way]
    count, ratios = len(requests), requests[0].ratios
    signs = np.array([each.signs[sign] for each in requests])
    over = [np.array([[*(kl > most for kl in each.kl), False] for each in requests]) for most in MAX_KL]
    spent, settings = np.array([*ratios, 1.0]), SHARES if how == "level" else PRICES
    found: list[Curve] = [[(np.zeros(count), np.zeros(count)) for _ in settings] for _ in MAX_KL]
    for division in range(bounds.DIVISIONS):
        order = np.random.default_rng(division).permutation(count)
        for group in range(bounds.GROUPS):
            own = order[group :: bounds.GROUPS]
            others = np.setdiff1d(order, own)
            take = (_levelled if how == "level" else _priced)(requests, signs, others)
            for at, most in enumerate(MAX_KL):
                for setting, (missed, cost) in zip(settings, found[at], strict=True):
                    taken = take(signs[own], most, setting)
                    missed[own] += over[at][own, taken] / bounds.DIVISIONS
                    cost[own] += spent[taken] / bounds.DIVISIONS
    return found


Take = Callable[[Numbers, float, float], NDArray[np.int64]]
"""(signs of some requests [requests, ratios], bound, setting) -> which ratio each takes; one more than there are is full prefill."""


def _levelled(requests: Sequence[Request], signs: Numbers, others: NDArray[np.int64]) -> Take:
    """The present way: each takes the least ratio that is predicted to keep the bound with the same chance, which is the setting."""
    ratios = requests[0].ratios
    seen = [
        Observation(int(i), *each)
        for i in others
        for each in zip(signs[i].tolist(), requests[i].kl, requests[i].same, strict=True)
    ]
    fitted = {share: Predictor.fit(ratios, seen, share) for share in SHARES}

    def take(own: Numbers, most: float, share: float) -> NDArray[np.int64]:
        predictor = fitted[share]
        assert predictor is not None
        found = (Bound(most, None, predictor).find(each)[0] for each in own.tolist())
        return np.array([(*ratios, 1.0).index(ratio) for ratio in found])

    return take


def _priced(requests: Sequence[Request], signs: Numbers, others: NDArray[np.int64]) -> Take:
    """The setting is a price of recomputing, the same for all requests: each takes the ratio at which its chance to be over the bound and the price of what it
    recomputes are least together. So requests that it helps much recompute much, and no division of the same cost has fewer over the bound, if what is predicted
    is right.

    KL is taken for log-normal around a mean that grows with the logarithm of the sign.
    """
    logs = np.log(np.maximum([requests[i].kl for i in others], TINY))
    slope, level = np.polyfit(_log(signs[others]).ravel(), logs.ravel(), 1)
    scatter = max(0.01, float((logs - level - slope * _log(signs[others])).std()))
    spent = np.array([*requests[0].ratios, 1.0])

    def take(own: Numbers, most: float, price: float) -> NDArray[np.int64]:
        above = (math.log(most) - level - slope * _log(own)) / scatter / math.sqrt(2)
        over = np.vectorize(math.erfc)(above) / 2
        over = np.column_stack([over, np.zeros(len(own))])
        return np.where(over > UNLIKELY, np.inf, over + price * spent).argmin(1)

    return take


def _log(signs: Numbers) -> Numbers:
    return np.log(np.maximum(signs, 1e-9))


def at_cost(curve: Curve, cost: float) -> Numbers | None:
    """Whether each request is over the bound if so much is spent on average, on a straight line between two settings. None if no setting spends so much, or so little."""
    costs = np.array([each.mean() for _, each in curve])
    order = np.argsort(costs, kind="stable")
    if not costs[order[0]] <= cost <= costs[order[-1]]:
        return None
    missed = np.array([curve[i][0] for i in order])
    return np.array([np.interp(cost, costs[order], each) for each in missed.T])


def at_equal_cost(requests: Sequence[Request]) -> tuple[dict[str, Numbers], Numbers, int]:
    """How often each request is over a bound, summed over the bounds and costs that count: by each way, and at a fixed ratio. And how many these are."""
    found = {way: curves(requests, way) for way, (_, sign) in WAYS.items() if sign in requests[0].signs}
    sums, fixed, count = {way: np.zeros(len(requests)) for way in found}, np.zeros(len(requests)), 0
    for at, most in enumerate(MAX_KL):
        for cost in COSTS:
            same = np.array([misses_at(each, cost, most) for each in requests])
            ways = {way: at_cost(each[at], cost) for way, each in found.items()}
            there = {way: missed for way, missed in ways.items() if missed is not None}
            if MISSES[0] <= same.mean() <= MISSES[1] and len(there) == len(found):
                count += 1
                fixed += same
                for way, missed in there.items():
                    sums[way] += missed
    return sums, fixed, count


def markdown(sets: dict[str, list[Request]]) -> str:
    """The table."""
    lines = [
        "",
        "## Other signs and other ways to spend",
        f"Requests over a `max_kl` from {MAX_KL[0]:g} to {MAX_KL[-1]:g}, as a part of those at one fixed ratio, and of those with the present way, which spend as much, "
        f"wherever {MISSES[0]:.0%} to {MISSES[1]:.0%} are over at the fixed ratio ({bounds.GROUPS} groups, {bounds.DIVISIONS} divisions). Level: all requests get the same chance. "
        "Price: more is recomputed where it helps most. "
        f"Empty: less than {bounds.FEWEST} requests are over at the fixed ratio.",
        "",
        "| set (n) | way | bounds and costs | part of the fixed ratio's | part of the present way's |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, requests in sets.items():
        # A fifth is predicted by the rest.
        if len(requests) - math.ceil(len(requests) / bounds.GROUPS) < FEWEST_PROMPTS:
            continue
        sums, fixed, count = at_equal_cost(requests)
        for way, missed in sums.items():
            few = fixed.sum() < bounds.FEWEST * max(1, count)
            parts = [] if few else [ratio_of_sums(missed, other) for other in (fixed, sums[PRESENT])]
            shown = " | ".join(number(each, 2) for each in parts) or " | "
            lines.append(f"| {name} ({len(requests)}) | {way} | {count} | {shown} |")
    return "\n".join(lines) + "\n"
