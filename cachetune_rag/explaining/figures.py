"""Figures as people read them."""

from __future__ import annotations


def share(value: float | None) -> str:
    """A share as a percentage; tiny ones don't become 0."""
    if value is None:
        return "–"
    if 0 < value < 0.0005:
        return "< 0.1%"
    return f"{value:.1%}" if value < 0.1 else f"{value:.0%}"


def seconds(value: float | None) -> str:
    """A time in seconds or milliseconds."""
    if value is None:
        return "–"
    if value >= 1:
        return f"{value:.2f} s"
    return f"{value * 1e3:.0f} ms" if value >= 0.01 else f"{value * 1e3:.1f} ms"


def count(value: int) -> str:
    """A number with separators."""
    return f"{value:,}"


def nats(value: float | None) -> str:
    """A KL. Float32 rounding is all there is below a millionth."""
    if value is None:
        return "–"
    if value < 1e-6:
        return "0"
    return f"{value:.2g}" if value < 0.01 else f"{value:.3f}"
