"""Finds, for each tier, the ratio and the share of skipped rows with which the first token comes soonest."""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from cachetune_rag.checking.arguments import check_callback, check_count, check_share
from cachetune_rag.errors import ConfigError
from cachetune_rag.measuring.bench import Bench
from cachetune_rag.measuring.tuning.cost import CostModel
from cachetune_rag.measuring.tuning.made_prompts import codec_of, made
from cachetune_rag.measuring.tuning.measure import TierMeasure, TierTooSmallError
from cachetune_rag.measuring.tuning.result import Point, TierTuning, TuneProgress, TuningResult
from cachetune_rag.measuring.tuning.saved import SavedTunings
from cachetune_rag.measuring.tuning.search import Line, Measured, Search
from cachetune_rag.measuring.user_prompts import prompts_of
from cachetune_rag.reuse.config import PAPER, resolve
from cachetune_rag.selection import get_selector, names
from cachetune_rag.text.prompts.prompt import Prompt
from cachetune_store.chunk import BLOCK_ROWS
from cachetune_store.printing import shown
from cachetune_store.tier_kinds import NAMES, kind_of

R_MIN = PAPER.ratio
"""The least ratio where none was calibrated: the paper's."""
R_MAX = 1.0
ROUNDS = 3
TOKENS = 4096
"""Default number of chunk tokens in a made prompt."""
PROMPTS = 2
"""How many prompts are made where no samples are given."""

_log = logging.getLogger(__name__)


class Measure(Measured, Protocol):
    """Measures on one tier."""

    def full(self, rounds: int) -> list[float]:
        """Seconds of full prefill, measured `rounds` times."""

    def cost(self, full: float, rounds: int) -> CostModel:
        """Times to move and to compute one token of one layer."""


MakeMeasure = Callable[[Bench, Sequence[Prompt], str, str], AbstractContextManager[Measure]]
"""Makes what measures on one tier, from (bench, prompts, tier, selector)."""


@dataclass(frozen=True)
class TuningPlan:
    """What to tune, checked as far as is possible without an engine. The fields are arguments of `CacheTune.tune`."""

    tier: str
    selector: str
    r_min: float | None
    r_max: float
    rounds: int
    tokens: int

    @classmethod
    def of(
        cls,
        *,
        tier: str = "auto",
        selector: str = "auto",
        r_min: float | None = None,
        r_max: float = R_MAX,
        rounds: int = ROUNDS,
        tokens: int = TOKENS,
    ) -> TuningPlan:
        """Check the arguments.

        Raises:
            ConfigError: one of them is out of range.
        """
        if tier not in (*NAMES, "auto"):
            raise ConfigError(f"tier is {shown(tier)}: use {', '.join(map(repr, NAMES))} or 'auto'.")
        name = resolve(selector, 0).selector
        if not get_selector(name).uses_ratio:
            raise ConfigError(f"selector {shown(name)} goes by no ratio, so there is none to find: use another.")
        if r_min is not None:
            check_share(r_min, "r_min")
        check_share(r_max, "r_max")
        if r_min is not None:
            _check_order(r_min, r_max)
        for label, count in (("rounds", rounds), ("tokens", tokens)):
            check_count(count, label, "a whole number, at least 1")
        return cls(tier, name, r_min, float(r_max), rounds, tokens)


class Tuner:
    """Tunes one selector for one engine, and saves the result.

    Args:
        bench: what to measure on.
        plan: what to tune.
        calibrated: gives the ratio that was calibrated for a selector, or None.
        saved: keeps the result.
        progress: called after every measured setting.
        measure: makes what measures on one tier. Tests give another one.

    Raises:
        ConfigError: the store has no such tier, or the least ratio is above r_max.
    """

    def __init__(
        self,
        bench: Bench,
        plan: TuningPlan,
        calibrated: Callable[[str], float | None],
        saved: SavedTunings,
        progress: Callable[[TuneProgress], None] | None = None,
        measure: MakeMeasure = TierMeasure,
    ):
        there = tuple(kind.name for kind in bench.store.tiers)
        if not there:
            raise ConfigError("the store has no host_budget and no folder, so no chunk is kept: give it one of both.")
        if plan.tier != "auto" and plan.tier not in there:
            raise ConfigError(
                f"tier is {shown(plan.tier)}: use 'auto' or a tier that this store has ({', '.join(there)})."
            )
        check_callback(progress, "progress")
        self._tiers = there if plan.tier == "auto" else (plan.tier,)
        self._selector = plan.selector
        floor = calibrated(self._selector)
        self._floor_calibrated = plan.r_min is None and floor is not None
        self._r_min = plan.r_min if plan.r_min is not None else R_MIN if floor is None else floor
        self._r_max = plan.r_max
        _check_order(self._r_min, self._r_max)
        self._bench, self._rounds, self._tokens = bench, plan.rounds, plan.tokens
        self._calibrated, self._saved = calibrated, saved
        self._progress, self._make_measure = progress, measure

    def tune(self, samples: Iterable[Any] | None = None) -> TuningResult:
        """Measure each tier and save what was found.

        Args:
            samples: prompts to measure, as for `CacheTune.tune`. Chunks that aren't stored are precomputed. None: prompts are made of
                stored chunks.

        Raises:
            ConfigError, PromptError: a sample can't be used, or the store holds nothing. Nothing was measured.
            CacheTuneError: chunks left the store meanwhile.
        """
        bench, started = self._bench, time.perf_counter()
        if samples is None:
            prompts = made(bench, tokens=self._tokens, count=PROMPTS)
        else:
            prompts = prompts_of(bench, samples)
            bench.store_missing(prompts)
        codec = codec_of(bench, prompts)
        tuned = []
        for tier in self._tiers:
            try:
                tuned.append(self._saved.save(self._tune(tier, codec, prompts, started)))
            except TierTooSmallError as error:
                if len(self._tiers) == 1:
                    raise
                _log.warning("the tier %s is left out: %s", tier, error)
        return TuningResult(self._saved.machine, tuple(tuned))

    def _tune(self, tier: str, codec: str, prompts: list[Prompt], started: float) -> TierTuning:
        measured = 0

        def tell(point: Point, best: Point) -> None:
            nonlocal measured
            measured += 1
            if self._progress is not None:
                seconds = time.perf_counter() - started
                self._progress(TuneProgress(tier, self._tiers, measured, point, best, seconds))

        with self._make_measure(self._bench, prompts, tier, self._selector) as measure:
            full = measure.full(self._rounds)
            cost = measure.cost(min(full), self._rounds)
            start = min(max(cost.balance, self._r_min), self._r_max)
            search = Search(measure, rounds=self._rounds, tell=tell)
            best = search.search(self._lines(tier, prompts), start)
        return TierTuning(
            tier=tier,
            codec=codec,
            selector=self._selector,
            ratio=best.ratio,
            skipped=best.skipped,
            ttft=best.ttft,
            full=statistics.median(full),
            r_min=self._r_min,
            r_max=self._r_max,
            calibrated=self._floor_calibrated,
            warm_start=start,
            cost=cost,
            prompts=len(prompts),
            points=search.points,
        )

    def _lines(self, tier: str, prompts: Sequence[Prompt]) -> list[Line]:
        """The settings among which to search.

        On the first line the selector chooses a share r_min of the tokens, its quality floor. On the second one the offline ranking
        chooses all of r, so that no selector has to wait for rows. That line is searched only above a floor that was calibrated for
        this ranking.
        """
        offline = names.OFFLINE
        if self._selector == offline:
            return [self._line(self._r_min, 0.0, tier, prompts)]
        lines = [self._line(self._r_min, self._r_min, tier, prompts)]
        floor = self._calibrated(offline)
        if floor is not None and floor <= self._r_max:
            lines.append(self._line(max(floor, self._r_min), 0.0, tier, prompts))
        return lines

    def _line(self, low: float, selected: float, tier: str, prompts: Sequence[Prompt]) -> Line:
        steps: tuple[float, ...] = ()
        if kind_of(tier).blocks:
            # A corpus's chunks mostly have about one length. Where they don't, these steps are of no use, and do no harm.
            tokens = statistics.median_low([len(p.chunk_ids[s.chunk]) for p in prompts for s in p.spans] or [0])
            steps = block_steps(tokens, selected)
        return Line(low, self._r_max, selected, steps)


def block_steps(tokens: int, selected: float) -> tuple[float, ...]:
    """The ratios, ascending, from which on one block of rows less is read of a chunk of `tokens` tokens.

    A share `selected` of the tokens is chosen among those that are read. Ratios are rounded up, because the number of skipped rows is
    rounded down.
    """
    shares = (1 - kept / tokens for kept in range((tokens - 1) // BLOCK_ROWS * BLOCK_ROWS, 0, -BLOCK_ROWS))
    return tuple(round(selected + math.ceil(share * 1e4 - 1e-6) / 1e4, 6) for share in shares)


def _check_order(r_min: float, r_max: float) -> None:
    if r_min > r_max:
        raise ConfigError(f"r_min is {r_min:g}, above r_max {r_max:g}: raise r_max, or lower r_min.")
