"""Cells and lines of tables in Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .measures import Estimate


def line(cells: Sequence[str]) -> str:
    """A line of a table."""
    return f"| {' | '.join(cells)} |"


def percent(estimate: Estimate | None, sign: str = "") -> str:
    """An estimate in percent, with its interval; empty if there is none. `sign`: "+" shows it for positive ones too."""
    if estimate is None or math.isnan(estimate.value):
        return ""
    return f"{100 * estimate.value:{sign}.1f} [{100 * estimate.low:{sign}.0f}, {100 * estimate.high:{sign}.0f}]"


def number(estimate: Estimate, digits: int, sign: str = "") -> str:
    """An estimate with its interval; empty if it is not a number."""
    if math.isnan(estimate.value):
        return ""
    return f"{estimate.value:{sign}.{digits}f} [{estimate.low:{sign}.{digits}f}, {estimate.high:{sign}.{digits}f}]"
