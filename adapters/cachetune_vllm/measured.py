"""How long vLLM's steps take in this server, and putting prompts together: what is measured decides whether reuse makes a request faster.

Everything is timed by the scheduler's process, from the moment when it plans something to the moment when it hears of the outcome. So whatever a request with
reuse waits for inside vLLM counts: messages, the thread's turn, empty steps and their pauses, and a machine that has other things to do.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Generic, TypeVar

from cachetune_store.tier_kinds import kind_of

ENOUGH = 3
"""Fewer measurements at about one number of tokens say nothing: one of them may have waited for a kernel to be compiled."""
KEPT = 9
"""So many of the latest ones are kept."""
REMEMBERED = 600.0
"""Seconds after which a measurement is forgotten."""
TRIED = 8
"""Where measurements alone speak against reuse, one request of so many reuses its chunks all the same: otherwise nothing would be measured any more, and what was slow
for a while (a busy machine, a kernel that was compiled) would count as slow until it is forgotten."""
FAR = 2
"""A number of tokens that is so many times as large as the largest that was measured is not judged, unless that is `LARGE`."""
LARGE = 1024
"""Tokens of a step, or of a prompt's chunks, beyond which the time grows with them."""
UNDER_WAY = 16
"""vLLM has fewer steps under way than this; an outcome that hasn't come by then isn't waited for."""

Point = tuple[float, float]
"""Tokens, and seconds."""


Sample = TypeVar("Sample")


class _Lately(Generic[Sample]):
    """The latest samples, in groups of about as many tokens."""

    def __init__(self, clock: Callable[[], float]):
        self._clock = clock
        self._groups: dict[int, deque[tuple[float, int, Sample]]] = {}

    def add(self, tokens: int, sample: Sample) -> None:
        self._groups.setdefault(tokens.bit_length(), deque(maxlen=KEPT)).append((self._clock(), tokens, sample))

    def points(self, seconds: Callable[[Sample], float]) -> list[Point]:
        """The median tokens and seconds of each group that has enough samples, in order."""
        since = self._clock() - REMEMBERED
        recent = ([each for each in group if each[0] >= since] for group in self._groups.values())
        return sorted(
            (
                statistics.median(tokens for _, tokens, _ in group),
                statistics.median(seconds(each) for *_, each in group),
            )
            for group in recent
            if len(group) >= ENOUGH
        )


def between(points: Sequence[Point], tokens: float) -> float | None:
    """The seconds at a number of tokens: on the lines between the points, the first point's below them, in proportion beyond them. None where that would be
    too far from what was measured."""
    if not points or (tokens > FAR * points[-1][0] and points[-1][0] < LARGE):
        return None
    (first, at_first), (last, at_last) = points[0], points[-1]
    if tokens <= first:
        return at_first
    if tokens >= last:
        return at_last * tokens / last
    for (low, at_low), (high, at_high) in pairwise(points):
        if tokens <= high:
            return at_low + (at_high - at_low) * (tokens - low) / (high - low)
    return None


@dataclass(frozen=True)
class _Begun:
    """A prompt that is being put together alone; see `Measured.load_begins`."""

    since: float
    kind: str
    stored: int
    to_compute: int


class Measured:
    """What was measured in one server. Not for several threads.

    Args:
        clock: gives seconds that only grow.
        least_reused: so many tokens vLLM reads in the time that reuse takes beside computing, as long as nothing was measured (`WorthLimits`).
    """

    def __init__(self, clock: Callable[[], float], least_reused: int):
        self._clock, self._least_reused = clock, least_reused
        self._steps = _Lately[float](clock)
        self._loads: dict[str, _Lately[tuple[int, float]]] = {}
        self._steps_begun: dict[int, tuple[float, int, bool]] = {}
        self._loads_begun: dict[str, _Begun | None] = {}
        self._number, self._last_end = 0, float("-inf")

    # -- measuring ------------------------------------------------------------------------------------------------

    def step_begins(self, tokens: int) -> int:
        """vLLM plans a step of so many tokens. Returns a number for it."""
        self._number += 1
        self._steps_begun[self._number] = self._clock(), tokens, not self._loads_begun
        self._steps_begun.pop(self._number - UNDER_WAY, None)
        return self._number

    def step_ends(self, number: int) -> None:
        """The outcome of a step has come. Steps end in order, and one that was planned before the last one's end begins there. Those beside which a prompt is put
        together don't count."""
        begun = self._steps_begun.pop(number, None)
        before, self._last_end = self._last_end, self._clock()
        if begun is None:
            return
        planned, tokens, alone = begun
        if alone and not self._loads_begun:
            self._steps.add(tokens, self._last_end - max(planned, before))

    def load_begins(self, request_id: str, kind: str, stored: int, to_compute: int, *, typical: bool) -> None:
        """A prompt begins to be put together. If another one is as well, neither says how long it takes alone.

        Args:
            request_id: names the prompt.
            kind: how its tokens are chosen: for prompts of one kind and length, that takes as long.
            stored: tokens of its stored chunks.
            to_compute: tokens that vLLM would compute without reuse.
            typical: whether nothing makes it differ from others of its kind.
        """
        if self._loads_begun:
            typical = False
            self._loads_begun = dict.fromkeys(self._loads_begun)
        self._loads_begun[request_id] = _Begun(self._clock(), kind, stored, to_compute) if typical else None

    def load_ends(self, request_id: str, reused: int | None) -> None:
        """A prompt is ready, with so many tokens reused; None: nothing came of it, or it isn't typical after all."""
        begun = self._loads_begun.pop(request_id, None)
        if begun is not None and reused is not None:
            load = begun.to_compute - reused, self._clock() - begun.since
            self._loads.setdefault(begun.kind, _Lately(self._clock)).add(begun.stored, load)

    # -- expecting ------------------------------------------------------------------------------------------------

    def plain(self, tokens: int) -> float | None:
        """The expected seconds in which vLLM reads so many tokens; None where too little was measured."""
        return between(self._steps.points(float), tokens)

    def times(self, kind: str, stored: int, computed: int, to_compute: int) -> tuple[float, float] | None:
        """The expected seconds until a prompt's first token: with reuse, and without; None where too little was measured.

        Args:
            kind, stored, to_compute: as of `load_begins`.
            computed: tokens that would be computed with reuse.
        """
        steps = self._steps.points(float)
        plain, last, fixed = (between(steps, tokens) for tokens in (to_compute, 1, self._least_reused))
        loads = self._loads.get(kind)
        if plain is None or last is None or loads is None:
            return None

        def beside(load: tuple[int, float]) -> float:
            """What a load took beside the computing."""
            tokens, seconds = load
            return max(0.0, seconds - (between(steps, tokens) or 0.0))

        points = loads.points(beside)
        if points and fixed is not None:
            # What a small prompt takes isn't known from large ones, whose rows take long to copy; but it isn't more than theirs.
            points = [(0.0, min(fixed, points[0][1])), *points]
        extra, computing = between(points, stored), between(steps, computed)
        return None if extra is None or computing is None else (extra + computing + last, plain)


def usual(report: Mapping[str, Any]) -> bool:
    """Whether a prompt was put together as it will be next time: from memory, with nothing that was missed, damaged or waited for in vain. Chunks that were read from a
    disk are in memory now, so the time that they took says nothing about the next prompt with them."""
    slow = any(read and not kind_of(tier).in_memory for tier, read in report.get("bytes_read", {}).items())
    return not slow and not any(report.get(what) for what in ("missed", "damaged", "unreadable", "timed_out"))


def shown(seconds: Iterable[float]) -> list[str]:
    """Times as a sentence has them."""
    return [f"{1000 * each:.0f} ms" for each in seconds]
