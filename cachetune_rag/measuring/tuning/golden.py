"""Golden-section search for the minimum of a function of one variable that falls, then rises."""

from __future__ import annotations

import math
from collections.abc import Callable

PHI = (1 + math.sqrt(5)) / 2
DIGITS = 3
"""Places of the arguments that are kept: a function is asked once for each of them."""


def minimise(
    function: Callable[[float], float],
    low: float,
    high: float,
    *,
    start: float | None = None,
    step: float = 0.08,
    tolerance: float = 0.02,
) -> dict[float, float]:
    """Look for the minimum of `function` in [low, high].

    The minimum is bracketed from `start` on, by steps that grow by the golden ratio, and the bracket is then narrowed by
    golden sections (Kiefer 1953). A good start saves most of the way: the first bracket is then the last but for a few
    sections. A minimum at an end of the interval is found as well.

    Args:
        function: unimodal on the interval; asked once for each argument, rounded to `DIGITS` places.
        start: where to begin, moved into the interval; default: the golden section of the whole.
        step: the first step to both sides.
        tolerance: width of the bracket at which it ends.

    Returns:
        Every argument asked for, with its value. The one with the least value is at most `tolerance` (and half a unit of the last
        place) away from the minimum of a unimodal function.

    Raises:
        ValueError: the interval is empty, or step or tolerance isn't positive.
    """
    if not low <= high or step <= 0 or tolerance <= 0:
        raise ValueError(
            f"[{low}, {high}], step {step}, tolerance {tolerance}: need low <= high, and the others above 0"
        )
    known: dict[float, float] = {}

    def at(x: float) -> float:
        place = min(max(round(x, DIGITS), low), high)
        if place not in known:
            known[place] = function(place)
        return known[place]

    middle = min(max(low + (high - low) / PHI if start is None else start, low), high)
    left, right = max(low, middle - step), min(high, middle + step)
    grown = step
    while left > low and at(left) <= at(middle):
        grown *= PHI
        left, middle, right = max(low, left - grown), left, middle
    grown = step
    while right < high and at(right) <= at(middle):
        grown *= PHI
        left, middle, right = middle, right, min(high, right + grown)
    at(left), at(middle), at(right)
    while right - left > tolerance:
        inner, outer = right - (right - left) / PHI, left + (right - left) / PHI
        if at(inner) <= at(outer):
            right = outer
        else:
            left = inner
    at((left + right) / 2)
    return known
