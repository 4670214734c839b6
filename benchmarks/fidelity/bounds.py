"""How well requests keep a bound that is predicted, against one fixed ratio of the same cost: from the rows of `benchmarks/bound.py`.

Nothing is measured here. Each record is predicted by what was fitted to other records of its set, and takes one of the measured ratios.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cachetune_rag.selection.bound import Bound
from cachetune_rag.selection.predictor import FEWEST_PROMPTS, Observation, Predictor

from .measures import Estimate, ratio_of_sums
from .rows import Row

MAX_KL = (0.02, 0.05, 0.1)
MIN_TOP1 = (0.9, 0.95)
GROUPS = 5
"""Groups of records; each is predicted by a fit to the others."""
DIVISIONS = 10
"""How often the records are divided into groups anew. What a record shows is the mean over these."""
FEWEST = 4
"""A part of fewer requests than this is not worth a figure."""
TINY = 1e-9
"""A KL below this counts as this, where logarithms are taken."""


@dataclass(frozen=True)
class Request:
    """One record at every measured ratio, by ascending ratio from above 0.

    Attributes:
        ratios: the ratios.
        kl: KL of the first token.
        mean_kl: mean KL over the continuation.
        same: whether full prefill finds the same first token the likeliest.
        signs: by name, one number a ratio.
    """

    ratios: tuple[float, ...]
    kl: tuple[float, ...]
    mean_kl: tuple[float, ...]
    same: tuple[bool, ...]
    signs: dict[str, tuple[float, ...]]

    @property
    def sign(self) -> tuple[float, ...]:
        """The one that predictions go by (`Report.sign`)."""
        return self.signs[SIGN]


SIGN = "error left x entropy"

BY_LAST = "error left, seen by the last token, x entropy"
SHAKEN = "how far shaking moves the next token, all tokens behind the chunks run again"
SHAKEN_LAST = "how far shaking moves the next token, the last token run again"
SPREAD = "error left, seen by the last token, x how far apart the likely tokens are"


def requests_of(rows: Sequence[Row]) -> dict[str, list[Request]]:
    """The records of each set that were measured at every ratio."""
    found: dict[tuple[str, str], dict[float, Row]] = {}
    for row in rows:
        found.setdefault((row["set"], row["record"]), {})[row["ratio"]] = row
    ratios = sorted({row["ratio"] for row in rows})
    made: dict[str, list[Request]] = {}
    for (name, _), record in sorted(found.items()):
        if set(record) == set(ratios):
            made.setdefault(name, []).append(_request([record[ratio] for ratio in ratios]))
    return made


def _request(rows: Sequence[Row]) -> Request:
    nothing, rows = rows[0]["signs"], rows[1:]
    taken = [row["signs"] for row in rows]
    left = [each["error_left"] / each["watched"] for each in taken]
    last = [each["error_last_left"] for each in taken]
    signs: dict[str, list[float]] = {
        SIGN: [error * nothing["entropy"] for error in left],
        BY_LAST: [error * nothing["entropy"] for error in last],
        "error left": left,
        "error left, seen by the last token": last,
        "entropy of the next token, nothing recomputed": [nothing["entropy"]] * len(rows),
        "attention left": [each["mass_left"] for each in taken],
        **(_dearer(nothing, taken, last) if "shaken" in nothing else {}),
        "how far values moved (known afterwards)": [each["moved"] for each in taken],
        "entropy of the next token (known afterwards)": [each["entropy"] for each in taken],
    }
    return Request(
        tuple(row["ratio"] for row in rows),
        tuple(row["kl"][0] for row in rows),
        tuple(float(np.mean(row["kl"])) for row in rows),
        tuple(bool(row["same"][0]) for row in rows),
        {name: tuple(values) for name, values in signs.items()},
    )


def _dearer(
    nothing: dict[str, float], taken: Sequence[dict[str, float]], last: Sequence[float]
) -> dict[str, list[float]]:
    """Signs that older rows don't have (`fidelity/shaken.py`). KL grows with the square of an error, so its root is the sign."""
    return {
        SPREAD: [error * nothing["spread"] for error in last],
        SHAKEN: [math.sqrt(each["shaken"]) for each in taken],
        SHAKEN_LAST: [math.sqrt(each["shaken_last"]) for each in taken],
    }


# -- rank correlation -------------------------------------------------------------------------------------------------


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's, with equal values at their mean rank."""
    first, second = (_ranks(np.asarray(each, float)) for each in (a, b))
    if first.std() == 0 or second.std() == 0:
        return float("nan")
    return float(np.corrcoef(first, second)[0, 1])


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[which]


def correlations(
    requests: Sequence[Request], sign: str, kl: Callable[[Request], Sequence[float]]
) -> tuple[float, float]:
    """Of a sign with KL: over all ratios together, and among the requests at one ratio (mean over ratios)."""
    signs = np.array([each.signs[sign] for each in requests])
    found = np.array([kl(each) for each in requests])
    at_one = [rank_correlation(signs[:, i], found[:, i]) for i in range(signs.shape[1])]
    return rank_correlation(signs.ravel(), found.ravel()), float(np.mean(at_one))


# -- bounds -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kept:
    """What requests with a bound did.

    Attributes:
        over: share of the requests that missed the bound (for top-1: whose first token is another one).
        ratio: the mean ratio that was spent; full prefill spends 1.
        full: share of the requests that were given full prefill.
        fixed: share that misses it if all are given the ratio of the same mean.
        needed: the least fixed ratio at which no more miss it than `over`.
        against: `over` as a part of `fixed`, with its interval over records; None where too few miss it at the fixed ratio to say.
    """

    over: float
    ratio: float
    full: float
    fixed: float
    needed: float
    against: Estimate | None


def kept(requests: Sequence[Request], max_kl: float | None = None, min_top1: float | None = None) -> Kept | None:
    """Give each request the ratio that a bound takes, by predictions fitted to others. None if those are too few to fit anything to."""
    over, spent, full = (np.zeros(len(requests)) for _ in range(3))
    for division in range(DIVISIONS):
        order = np.random.default_rng(division).permutation(len(requests))
        for group in range(GROUPS):
            seen = [
                Observation(int(i), *each)
                for place, i in enumerate(order)
                if place % GROUPS != group
                for each in zip(requests[i].sign, requests[i].kl, requests[i].same, strict=True)
            ]
            predictor = Predictor.fit(requests[0].ratios, seen)
            if predictor is None:
                return None
            for i in order[group::GROUPS]:
                request = requests[i]
                ratio, _ = Bound(max_kl, min_top1, predictor).find(request.sign)
                spent[i] += ratio / DIVISIONS
                if ratio == 1:
                    full[i] += 1 / DIVISIONS
                else:
                    over[i] += _misses(request, request.ratios.index(ratio), max_kl) / DIVISIONS
    mean = float(spent.mean())
    fixed = _missing(requests, mean, max_kl)
    grid = [*np.geomspace(requests[0].ratios[0], 0.99, 200).tolist(), 1.0]
    needed = next(ratio for ratio in grid if _missing(requests, ratio, max_kl).mean() <= over.mean())
    against = None if fixed.sum() < FEWEST else ratio_of_sums(over, fixed)
    return Kept(float(over.mean()), mean, float(full.mean()), float(fixed.mean()), needed, against)


def _missing(requests: Sequence[Request], ratio: float, max_kl: float | None) -> NDArray[np.float64]:
    """Which requests miss the bound if all are given one ratio."""
    return np.array([misses_at(request, ratio, max_kl) for request in requests])


def _misses(request: Request, at: int, max_kl: float | None) -> float:
    return float(not request.same[at] if max_kl is None else request.kl[at] > max_kl)


def misses_at(request: Request, ratio: float, max_kl: float | None) -> float:
    """Whether a request misses the bound at a ratio between measured ones: by its KL on a straight line between their logarithms, or for top-1
    by the share of both neighbours. At 1 nothing misses it."""
    if ratio == 1:
        return 0.0
    places = np.log([*request.ratios, 1.0])
    if max_kl is None:
        return float(np.interp(np.log(ratio), places, [*(float(not same) for same in request.same), 0.0]))
    logs = np.log(np.maximum([*request.kl, TINY], TINY))
    return float(np.exp(np.interp(np.log(ratio), places, logs)) > max_kl)


# -- tables -----------------------------------------------------------------------------------------------------------


def markdown(header: dict[str, Any], rows: Sequence[Row]) -> str:
    """The tables."""
    sets = requests_of(rows)
    if len(sets) > 1:
        sets["both"] = [request for each in sets.values() for request in each]
    where = header["environment"].get("gpu") or header["environment"]["processor"]
    lines = [
        f"# Bounds: {header['model']}, {header['dtype']}, {where}, commit {header['commit']}",
        "",
        "## Rank correlation of signs with KL",
        "Over all ratios together / among requests at one ratio (mean over ratios).",
        "",
        "| set (n) | sign | KL of the first token | mean KL of the continuation |",
        "| --- | --- | --- | --- |",
    ]
    for name, requests in sets.items():
        for sign in requests[0].signs:
            first, mean = (correlations(requests, sign, kl) for kl in (lambda r: r.kl, lambda r: r.mean_kl))
            cells = " | ".join(f"{_two(a)} / {_two(b)}" for a, b in (first, mean))
            lines.append(f"| {name} ({len(requests)}) | {sign} | {cells} |")
    lines += [
        "",
        "## Requests that miss a bound",
        f"Predicted by fits to other records ({GROUPS} groups, {DIVISIONS} divisions), against one fixed ratio of the same mean cost.",
        "",
        "| set (n) | bound | mean ratio | full prefill | over the bound | at the fixed ratio | part of it | fixed ratio for as few |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    too_few = []
    for name, requests in sets.items():
        bounds = [("max_kl", {"max_kl": value}) for value in MAX_KL] + [("min_top1", {"min_top1": v}) for v in MIN_TOP1]
        for what, bound in bounds:
            found = kept(requests, **bound)
            if found is None:
                too_few.append(f"{name} ({len(requests)})")
                break
            part = (
                ""
                if found.against is None
                else f"{found.against.value:.2f} [{found.against.low:.2f}, {found.against.high:.2f}]"
            )
            lines.append(
                f"| {name} ({len(requests)}) | `{what}={bound[what]:g}` | {found.ratio:.3f} | {found.full:.0%} | {found.over:.1%} | "
                f"{found.fixed:.1%} | {part} | {found.needed:.3f} |"
            )
    if too_few:
        lines += [
            "",
            f"Left out, because a prediction is fitted to {FEWEST_PROMPTS} other records at least: {', '.join(too_few)}. Measure more records.",
        ]
    return "\n".join(lines) + "\n"


def _two(value: float) -> str:
    """A figure with two places. A rank correlation of values that are all alike is none."""
    return "-" if np.isnan(value) else f"{value:.2f}"
