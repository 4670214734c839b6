"""Settings of reuse that the engine refuses, for the classes of every framework."""

from __future__ import annotations

from typing import Any

REFUSED: list[tuple[str, Any]] = [
    *((name, value) for name in ("ratio", "max_kl", "min_top1", "min_sure") for value in (True, "0.5", float("nan"))),
    *((name, value) for name in ("ratio", "min_top1", "min_sure") for value in (3, -0.1)),
]
"""The name of a setting, and a value that it can't have."""
