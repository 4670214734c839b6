"""Decides whether a prompt whose chunks must be read from a disk is left to vLLM, because reuse would then take longer than vLLM takes for the prompt."""

from __future__ import annotations

from dataclasses import dataclass

from cachetune_rag.reuse.reading import Reading
from cachetune_vllm.measured import TRIED, shown

USUAL = 1.1
"""Reuse from a disk is expected to take so many times its least time. That leaves out what passes around the engine, the choosing itself, and a disk and a model that wait for each
other. Chosen by what was measured outside of vLLM: twelve prompts of 16,384 and 32,768 tokens took 0.92 to 1.23 times as long, 1.07 in the median (docs/performance-disk.md, "Opening
chunks on disk"). Inside vLLM, it was 1.1 to 1.5 times, 1.2 in the median of eight settings ("From disk inside vLLM" there)."""


@dataclass(frozen=True)
class Plain:
    """What vLLM takes for a prompt without reuse.

    Attributes:
        seconds: expected until it has read it.
        first: the tokens before this one are in its prefix cache.
        tokens: how many it would compute.
    """

    seconds: float
    first: int
    tokens: int

    def of(self, tokens: int) -> float:
        """The seconds of some of its tokens, wherever they stand."""
        return self.seconds * tokens / self.tokens


@dataclass(frozen=True)
class FromDisk:
    """Expected seconds of a prompt whose chunks must be read from a disk.

    Attributes:
        plain: without reuse.
        reading: how long its rows take to be read.
        computing: how long its other tokens take to be computed: their share of `plain`.
        least: the least time that reuse takes. A selector that looks at rows before it chooses has both one behind the other; others, both at the same time.
    """

    plain: float
    reading: float
    computing: float
    least: float

    @classmethod
    def of(cls, plain: Plain, reading: Reading) -> FromDisk:
        """The times of a prompt, by what its worker has found out about its chunks."""
        computed = plain.tokens - reading.reused
        meanwhile = min(max(0, reading.ready - plain.first), computed)
        least = reading.least(plain.of(meanwhile), plain.of(computed - meanwhile))
        return cls(plain.seconds, reading.seconds, plain.of(computed), least)

    @property
    def reuse(self) -> float:
        """With reuse."""
        return USUAL * self.least

    @property
    def why(self) -> str:
        """Why the prompt is left to vLLM, as a sentence."""
        reuse, reading, computing, plain = shown((self.reuse, self.reading, self.computing, self.plain))
        (behind,) = shown([self.least - self.reading])
        return (
            f"reuse would take about {reuse}, as its chunks take {reading} to be read from disk and its other tokens {computing} to be computed, "
            f"{behind} of that behind the reading; vLLM takes {plain} for the prompt, by what this server took lately"
        )


class SlowDisk:
    """The decision for the prompts of one worker. Workers that share a model ask it alike, so it says the same to all. Not for several threads."""

    def __init__(self) -> None:
        self._slow = 0

    def leaves(self, times: FromDisk) -> bool:
        """Whether a prompt is left to vLLM. Every so many prompts with too slow a disk reuse their chunks all the same, so that what was slow for a while is
        measured anew."""
        if times.reuse <= times.plain:
            return False
        self._slow += 1
        return self._slow % TRIED != 0
