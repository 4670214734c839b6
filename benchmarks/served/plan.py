"""What is measured on which server, and in which order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Variant = Literal["vllm", "reuse", "ceiling"]
"""Plain vLLM, vLLM with this package's connector, vLLM with a connector that does a prefill for nothing."""

PHASES = ("alone", "saturated", "gaps", "arrivals", "short", "plain", "prefix", "shares", "ceiling")
SETTINGS: dict[str, dict[str, Any]] = {
    "frequency 0.05": {"selector": "frequency", "ratio": 0.05},
    "default 0.05": {"ratio": 0.05},
    "default 0.15": {"ratio": 0.15},
}
"""The settings of requests that reuse, by the name in tables."""
SHORT = (256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class Cell:
    """One measurement.

    Attributes:
        variant: the server.
        phase: one of `PHASES`.
        context: tokens of chunks in a prompt.
        setting: a name of `SETTINGS`, "auto" (a request without settings), or "" where nothing is reused.
        detail: what differs further: a share, an order, a rate.
    """

    variant: Variant
    phase: str
    context: int
    setting: str = ""
    detail: str = ""

    @property
    def name(self) -> str:
        """Identifies it in the results."""
        return "/".join(map(str, (self.variant, self.phase, self.context, self.setting, self.detail))).rstrip("/")


def cells(phases: Sequence[str], contexts: Sequence[int], settings: Sequence[str]) -> Iterator[Cell]:
    """All cells, grouped by server, the most important first."""
    for context in contexts:
        for phase in ("alone", "saturated", "gaps"):
            if phase in phases:
                yield Cell("vllm", phase, context)
        if "plain" in phases:
            yield Cell("vllm", "plain", context)
        if "arrivals" in phases:
            yield Cell("vllm", "arrivals", context, detail="0.9")
        if "prefix" in phases:
            yield from (Cell("vllm", "prefix", context, detail=order) for order in ("same", "shuffled"))
    if "short" in phases:
        yield from (Cell("vllm", "short", context) for context in SHORT)
    for context in contexts:
        for phase in ("alone", "saturated", "gaps"):
            if phase in phases:
                yield from (Cell("reuse", phase, context, setting) for setting in settings)
        if "plain" in phases:
            yield Cell("reuse", "plain", context)
        if "arrivals" in phases:
            yield from (
                Cell("reuse", "arrivals", context, setting, detail)
                for setting in settings
                for detail in ("0.9", "2", "4")
            )
        if "shares" in phases:
            yield from (
                Cell("reuse", "shares", context, "auto", detail) for detail in ("stored 0.8", "stored 0", "log-normal")
            )
    if "short" in phases:
        yield from (Cell("reuse", "short", context, "auto") for context in SHORT)
    if "ceiling" in phases:
        yield from (Cell("ceiling", "ceiling", context) for context in contexts)
