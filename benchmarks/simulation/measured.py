"""How long a replica's GPU takes for a request, from the file of benchmarks/serving.py."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Arrivals:
    """Seconds to the first token, of requests that came to one replica at these times."""

    full: bool
    rate: float
    at: tuple[float, ...]
    median: float
    p99: float


@dataclass(frozen=True)
class Times:
    """Seconds of one replica, as they were measured.

    Attributes:
        full: until the first token of a prompt that is computed in full, alone.
        reuse: the same with all chunks reused from host memory.
        full_between, reuse_between: seconds more that a saturated replica takes for a request: for the answer, mostly.
        tokens: of these answers.
        step: seconds between two tokens of an answer.
        at_once: requests that a saturated replica answers at once.
        skipped: share of the rows of chunks that isn't read, since it is computed.
        overlaps: rows that come from disk or the network come while others are computed.
        arrivals: what was measured where requests arrived at random times: reused or in full, requests a second, when they came, median and p99.
        source: where all this is from.
    """

    full: float
    reuse: float
    full_between: float
    reuse_between: float
    tokens: int
    step: float
    at_once: int
    skipped: float
    overlaps: bool
    arrivals: tuple[Arrivals, ...]
    source: str

    def prefill(self, computed: float) -> float:
        """Seconds for a prompt of which this share of chunks is nowhere: a straight line between the two that were measured."""
        return self.reuse + (self.full - self.reuse) * computed

    def answer(self, tokens: int, *, full: bool) -> float:
        """Seconds of the GPU for an answer, beside others: what was measured, and a step's share for each token more."""
        between = self.full_between if full else self.reuse_between
        return max(0.0, between + (tokens - self.tokens) * self.step / self.at_once)


def read_times(path: Path, context: int, setting: str) -> Times:
    """What was measured for prompts with so many tokens of chunks, reused in this setting."""
    if not path.is_file():
        raise ValueError(f"{path} is not there: give a file of benchmarks/serving.py.")
    found: dict[str, Any] = json.loads(path.read_text())
    groups = found["groups"]

    def group(kind: str) -> Any:
        name = f"{kind}/{context}" if kind.startswith("vllm/") else f"{kind}/{context}/{setting}"
        if name not in groups:
            had = sorted(each.split("/", 2)[2] for each in groups if each.startswith("reuse/alone/"))
            raise ValueError(f"{path} has no {name!r}: use a context and setting of {', '.join(had)}.")
        return groups[name]

    full, reuse = group("vllm/alone")["ttft"]["median"], group("reuse/alone")["ttft"]["median"]
    report = group("reuse/alone")["last_report"]
    environment, settings = found["environment"], found["settings"]
    return Times(
        full=full,
        reuse=reuse,
        full_between=max(0.0, 1 / group("vllm/saturated")["requests_per_second"] - full),
        reuse_between=max(0.0, 1 / group("reuse/saturated")["requests_per_second"] - reuse),
        tokens=settings["tokens"],
        step=_step(groups, context, setting, path),
        at_once=settings["at_once"],
        skipped=report["skipped"] / context,
        # A selector that looks at all layers first computes nothing else before the last row has come (docs/performance.md, "Against the targets").
        overlaps=report["selector"] == "frequency",
        arrivals=tuple(_arrivals(groups, f"vllm/arrivals/{context}//"))
        + tuple(_arrivals(groups, f"reuse/arrivals/{context}/{setting}/")),
        source=f"{path.name} ({settings['shape']}, {environment['gpu']}, vLLM {environment['vllm']}, commit {environment['commit']})",
    )


def _step(groups: dict[str, Any], context: int, setting: str, path: Path) -> float:
    """Seconds between two tokens of an answer. The answers that are looked at are the same ones whatever arrives beside them, so prompts of another context will do."""
    found = {
        int(name.split("/")[2]): each["gaps"]["p50"]
        for name, each in groups.items()
        if name.startswith("reuse/gaps/") and name.endswith(f"/{setting}")
    }
    if not found:
        raise ValueError(f"{path} has no 'reuse/gaps/{context}/{setting}': measure the phase gaps with that setting.")
    return found[min(found, key=lambda other: abs(other - context))]


def _arrivals(groups: dict[str, Any], start: str) -> Iterator[Arrivals]:
    """What was measured there. Cells of files that don't say when requests came are left out."""
    for name, found in groups.items():
        if name.startswith(start) and "arrived" in found:
            ttft = found["ttft"]
            yield Arrivals(name.startswith("vllm/"), found["rate"], tuple(found["arrived"]), ttft["p50"], ttft["p99"])
