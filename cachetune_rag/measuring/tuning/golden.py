"""Golden-section search for the minimum of a function of one variable that first falls and then rises."""

from __future__ import annotations

import math
from collections.abc import Callable

PHI = (1 + math.sqrt(5)) / 2
DIGITS = 3
"""Decimal places to which arguments are rounded. The function is called once for each rounded argument."""


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

    First, steps to both sides of `start`, which grow by the golden ratio, find an interval around the minimum. Golden sections then
    narrow it (Kiefer 1953). The nearer `start` is to the minimum, the fewer calls are needed. The minimum may be at an end of the
    interval.

    Args:
        function: has one minimum on the interval. It is called once for each argument, rounded to `DIGITS` places.
        start: where to begin. Outside of the interval, its nearer end is taken; None: the golden section of the interval.
        step: the first step to both sides.
        tolerance: the search ends when the minimum is known this closely.

    Returns:
        Every argument that the function was called with, and its value. The argument of the least value is at most `tolerance` (and
        half a unit of the last decimal place) away from the minimum.

    Raises:
        ValueError: the interval is empty, or step or tolerance isn't above 0.
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
