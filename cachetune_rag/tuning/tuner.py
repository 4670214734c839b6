"""Tuning an engine: for each tier the ratio, and the share of it that isn't read, at which the first token comes soonest."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from cachetune_rag.config import PAPER, resolve
from cachetune_rag.errors import ConfigError
from cachetune_rag.prompt import Prompt
from cachetune_rag.selection.frequency import FrequencySelector
from cachetune_rag.tuning import samples as sampling
from cachetune_rag.tuning.cost import CostModel
from cachetune_rag.tuning.measure import TierMeasure, tiers_of
from cachetune_rag.tuning.result import Point, TierTuning, TuneProgress, TuningResult
from cachetune_rag.tuning.search import Line, Measured, Search

if TYPE_CHECKING:
    from cachetune_rag.engine import CacheTune

R_MIN = PAPER.ratio
"""The quality floor where none was calibrated: the paper's."""
R_MAX = 1.0
ROUNDS = 3
TOKENS = 4096
"""Chunk tokens of a made prompt."""
PROMPTS = 2
"""Made prompts."""

_NO_RATIO = ("all", "none")


class Measure(Measured, Protocol):
    """All that is measured on one tier."""

    def full(self, rounds: int) -> float:
        """Seconds of full prefill."""

    def cost(self, full: float, rounds: int) -> CostModel:
        """Times to move and to compute a token of a layer."""


MakeMeasure = Callable[["CacheTune", Sequence[Prompt], str, str], AbstractContextManager[Measure]]
"""(engine, prompts, tier, selector) -> what measures there."""


class Tuner:
    """Tunes one selector on one engine, and saves the result.

    Args:
        engine: the engine.
        tier: the tier to tune for, or "auto": each that chunks can come from.
        selector: whose ratio is sought, or "auto".
        r_min: the least ratio, in [0, 1]; None: the calibrated one, or the paper's 0.15 where there is none.
        r_max: the largest ratio.
        rounds: times that every setting is measured; the median counts.
        tokens: chunk tokens of a made prompt.
        progress: called after every measured setting.
        measure: what measures; another one for tests.

    Raises:
        ConfigError: an argument is out of range.
    """

    def __init__(
        self,
        engine: CacheTune,
        *,
        tier: str = "auto",
        selector: str = "auto",
        r_min: float | None = None,
        r_max: float = R_MAX,
        rounds: int = ROUNDS,
        tokens: int = TOKENS,
        progress: Callable[[TuneProgress], None] | None = None,
        measure: MakeMeasure = TierMeasure,
    ):
        there = tiers_of(engine)
        if not there:
            raise ConfigError("the store has no host_budget and no folder, so no chunk is kept: give it one of both.")
        if tier != "auto" and tier not in there:
            raise ConfigError(f"tier is {tier!r}: use 'auto' or a tier that this store has ({', '.join(there)}).")
        self._tiers = there if tier == "auto" else (tier,)
        self._selector = resolve(selector, 0).selector
        if self._selector in _NO_RATIO:
            raise ConfigError(f"selector {self._selector!r} goes by no ratio, so there is none to find: use another.")
        calibrated = engine.calibrated_ratio(self._selector)
        self._calibrated = r_min is None and calibrated is not None
        self._r_min = _share("r_min", r_min if r_min is not None else R_MIN if calibrated is None else calibrated)
        self._r_max = _share("r_max", r_max)
        if self._r_min > self._r_max:
            raise ConfigError(f"r_min is {self._r_min:g}, above r_max {self._r_max:g}: raise r_max, or lower r_min.")
        for name, value, least in (("rounds", rounds, 1), ("tokens", tokens, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{name} is {value!r}: use a whole number, at least {least}.")
        self._engine, self._rounds, self._tokens = engine, rounds, tokens
        self._progress, self._make_measure = progress, measure
        self._saved = engine._tunings

    def run(self, samples: Iterable[Any] | None = None) -> TuningResult:
        """Measure and save.

        Args:
            samples: prompts to measure (dicts with query, chunks and perhaps prefix; or `Prompt`s); chunks that aren't stored are
                precomputed. None: prompts made of stored chunks.

        Raises:
            ConfigError, PromptError: a sample can't be used, or the store holds nothing; nothing was measured.
            CacheTuneError: chunks left the store meanwhile.
        """
        engine, started = self._engine, time.perf_counter()
        if samples is None:
            prompts = sampling.made(engine, tokens=self._tokens, count=PROMPTS)
        else:
            prompts = sampling.own(engine, samples)
            missing = {
                ids: text
                for prompt in prompts
                for ids, text in zip(prompt.chunk_ids, prompt.chunk_texts, strict=True)
                if ids and not engine.store.contains(engine._assembler.key(ids))
            }
            engine._precomputer.store_chunks(missing.items())
        codec = sampling.codec_of(engine, prompts)
        tuned = [self._saved.save(self._tune(tier, codec, prompts, started)) for tier in self._tiers]
        return TuningResult(self._saved.hardware, tuple(tuned))

    def _tune(self, tier: str, codec: str, prompts: list[Prompt], started: float) -> TierTuning:
        measured = 0

        def tell(point: Point, best: Point) -> None:
            nonlocal measured
            measured += 1
            if self._progress is not None:
                seconds = time.perf_counter() - started
                self._progress(TuneProgress(tier, self._tiers, measured, point, best, seconds))

        with self._make_measure(self._engine, prompts, tier, self._selector) as measure:
            full = measure.full(self._rounds)
            cost = measure.cost(full, self._rounds)
            start = min(max(cost.balance, self._r_min), self._r_max)
            search = Search(measure, rounds=self._rounds, tell=tell)
            best = search.run(self._lines(), start)
        return TierTuning(
            tier=tier,
            codec=codec,
            selector=self._selector,
            ratio=best.ratio,
            skipped=best.skipped,
            ttft=best.ttft,
            full=full,
            r_min=self._r_min,
            r_max=self._r_max,
            calibrated=self._calibrated,
            warm_start=start,
            cost=cost,
            prompts=len(prompts),
            points=search.points,
        )

    def _lines(self) -> list[Line]:
        """What r may be.

        The selector's own share stays r_min, its quality floor. Instead of it, the offline ranking may choose all of r, so that
        no selector waits for rows; but only above a floor that was calibrated for that ranking itself.
        """
        offline = FrequencySelector.name
        if self._selector == offline:
            return [Line(self._r_min, self._r_max, selected=0.0)]
        lines = [Line(self._r_min, self._r_max, selected=self._r_min)]
        floor = self._engine.calibrated_ratio(offline)
        if floor is not None and floor <= self._r_max:
            lines.append(Line(max(floor, self._r_min), self._r_max, selected=0.0))
        return lines


def _share(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ConfigError(f"{name} is {value!r}: use a number from 0 to 1.")
    return float(value)
