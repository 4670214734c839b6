"""Measuring a calibrated ratio: the smallest at which reuse stays close enough to full prefill on a user's own prompts."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from cachetune_rag.checking.arguments import check_callback, check_count, is_number
from cachetune_rag.errors import CacheTuneError, ConfigError
from cachetune_rag.measuring.bench import Bench
from cachetune_rag.measuring.calibration.result import Calibration, RatioFigures, choose
from cachetune_rag.measuring.divergence import Divergence
from cachetune_rag.measuring.user_prompts import prompts_of
from cachetune_rag.reuse.config import ReuseConfig, resolve
from cachetune_rag.reuse.state import PrefillState
from cachetune_rag.selection import get_selector
from cachetune_rag.selection.bound import SignOnly
from cachetune_rag.selection.predictor import Observation, Predictor
from cachetune_rag.text.prompts.prompt import Prompt
from cachetune_store.printing import shown

RATIOS = (0.0, 0.02, 0.05, 0.10, 0.15, 0.20, 0.30, 0.40, 0.50, 0.70)
BOUNDS = {"kl": 0.05, "top1": 0.95}
"""Default bounds: nats a token, and share of tokens. They are chosen, not measured."""
MAX_TOKENS = 1024

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CalibrationProgress:
    """How far a calibration is. Its callback gets one after every prefill.

    Attributes:
        sample, samples: number of the sample that is being measured, from 1, and how many there are.
        done, total: prefills so far, and in all.
        seconds: time since the start.
    """

    sample: int
    samples: int
    done: int
    total: int
    seconds: float


@dataclass(frozen=True)
class CalibrationPlan:
    """What is measured, and which bound has to hold. Made by `of`; the fields are arguments of `CacheTune.calibrate`."""

    measure: str
    bound: float
    quantile: float | None
    selector: str
    ratios: tuple[float, ...]
    tokens: int

    @classmethod
    def of(
        cls,
        *,
        bound: float | None = None,
        measure: str = "kl",
        selector: str = "auto",
        ratios: Sequence[Any] = RATIOS,
        tokens: int = 32,
        quantile: float | None = None,
    ) -> CalibrationPlan:
        """Check the arguments and fill in defaults.

        Raises:
            ConfigError: an argument is out of range.
        """
        selector = resolve(selector, 0).selector
        if not get_selector(selector).uses_ratio:
            raise ConfigError(f"selector {shown(selector)} goes by no ratio, so there is none to find: use another.")
        if not isinstance(measure, str) or measure not in BOUNDS:
            raise ConfigError(f"measure is {shown(measure)}: use 'kl' or 'top1'.")
        bound = BOUNDS[measure] if bound is None else bound
        if not is_number(bound, 0, sys.float_info.max if measure == "kl" else 1):
            allowed = "nats a token, at least 0" if measure == "kl" else "a share of tokens from 0 to 1"
            raise ConfigError(f"bound is {shown(bound)} for measure {shown(measure)}: use {allowed}.")
        if quantile is not None and not (is_number(quantile, 0, 1) and quantile):
            raise ConfigError(
                f"quantile is {shown(quantile)}: use a share of the samples above 0, up to 1, or None (the mean)."
            )
        if (
            isinstance(ratios, str | bytes | bytearray | Mapping)
            or not isinstance(ratios, Sequence)
            or "auto" in ratios
            or not ratios
        ):
            raise ConfigError(f"ratios is {shown(ratios)}: use a list of at least one number from 0 to 1.")
        checked = sorted({resolve(selector, ratio).ratio for ratio in ratios})
        check_count(tokens, "tokens", f"an int from 1 to {MAX_TOKENS}", 1, MAX_TOKENS)
        return cls(measure, float(bound), quantile, selector, tuple(checked), tokens)


class Calibrator:
    """Measures one selector.

    Args:
        bench: what to measure on.
        plan: what to measure.
        progress: called after every prefill.
    """

    def __init__(
        self,
        bench: Bench,
        plan: CalibrationPlan,
        progress: Callable[[CalibrationProgress], None] | None = None,
    ):
        check_callback(progress, "progress")
        self._bench, self._plan, self._progress = bench, plan, progress

    def calibrate(self, samples: Iterable[Any]) -> Calibration:
        """Measure all samples. The result is not saved.

        Raises:
            ConfigError, PromptError: a sample can't be used. Nothing was computed.
            CacheTuneError: the samples' chunks don't stay in the store, or lead-ins were chosen meanwhile.
        """
        prompts = prompts_of(self._bench, samples)
        started = time.perf_counter()
        total = len(prompts) * (1 + len(self._plan.ratios))
        done = 0

        def tell(number: int) -> None:
            nonlocal done
            done += 1
            if self._progress is not None:
                self._progress(CalibrationProgress(number, len(prompts), done, total, time.perf_counter() - started))

        self._store_all(prompts)
        namespace = self._bench.namespace
        found = [self._measure(prompt, number, tell) for number, prompt in enumerate(prompts, start=1)]
        if self._bench.namespace != namespace:
            raise CacheTuneError(
                "lead-ins were chosen while it measured, so chunks are other ones now: calibrate again."
            )
        figures = tuple(
            self._figures(ratio, [sample[i] for sample, _ in found]) for i, ratio in enumerate(self._plan.ratios)
        )
        ratio = choose(figures)
        predicted = [r for r in self._plan.ratios if 0 < r < 1]
        return Calibration(
            ratio=1.0 if ratio is None else ratio,
            met=ratio is not None and ratio < 1,
            selector=self._plan.selector,
            measure=self._plan.measure,
            bound=self._plan.bound,
            quantile=self._plan.quantile,
            samples=len(prompts),
            target_tokens=sum(len(sample[0].kl) for sample, _ in found),
            figures=figures,
            predictor=Predictor.fit(predicted, [seen for _, observed in found for seen in observed]),
        )

    def _store_all(self, prompts: Sequence[Prompt]) -> None:
        codec = self._bench.store.codec
        if others := sorted(self._bench.store_missing(prompts) - {codec}):
            _log.warning(
                "chunks of the samples are stored as %s, while this engine's codec is %s: the ratio is saved for engines "
                "of codec %s. Open the store with the codec that most of its chunks have.",
                " and ".join(others),
                codec,
                codec,
            )

    # -- measuring ------------------------------------------------------------------------------------------------

    def _measure(
        self, prompt: Prompt, number: int, tell: Callable[[int], None]
    ) -> tuple[list[Divergence], list[Observation]]:
        """How far each ratio is from full prefill on one sample; and the same where the request showed a sign of it."""
        target, reference = self._reference(prompt)
        tell(number)
        found, observed = [], []
        for ratio in self._plan.ratios:
            inside = 0 < ratio < 1 and get_selector(self._plan.selector).predicts
            finder = SignOnly() if inside else None
            state = self._reuse(prompt, ReuseConfig(self._plan.selector, ratio, finder=finder), number)
            divergence = Divergence.of(reference, self._bench.logits_behind(state, target))
            if not all(map(math.isfinite, divergence.kl)):
                raise CacheTuneError(f"sample {number}: the model gives logits that are no numbers; try another dtype.")
            found.append(divergence)
            if state.report.sign is not None:
                observed.append(Observation(number, state.report.sign, divergence.kl[0], divergence.same[0]))
            tell(number)
        return found, observed

    def _reference(self, prompt: Prompt) -> tuple[tuple[int, ...], list[Tensor]]:
        """Full prefill's greedy continuation, and the logits that each token of it was chosen from."""
        state = self._bench.prefill(prompt, None)
        target = self._bench.continuation(state, self._plan.tokens)
        # The logits are computed again, all in one forward, as they are for reuse. Rounding is then the same, and equal KV gives a KL of 0.
        return target, self._bench.logits_behind(state, target)

    def _reuse(self, prompt: Prompt, config: ReuseConfig, number: int) -> PrefillState:
        for _ in range(2):
            state = self._bench.prefill(prompt, config)
            if not state.report.missed:
                return state
            self._store_all([prompt])  # they were evicted or found damaged meanwhile
        raise CacheTuneError(
            f"sample {number}: {state.report.missed} tokens of its chunks don't stay in the store: give it a larger "
            "disk_budget (or host_budget, for a store in memory)."
        )

    def _figures(self, ratio: float, samples: Sequence[Divergence]) -> RatioFigures:
        kl, top1 = [s.mean_kl for s in samples], [s.top1 for s in samples]
        statistic = (
            _statistic(kl, self._plan.quantile)
            if self._plan.measure == "kl"
            else -_statistic([-t for t in top1], self._plan.quantile)
        )
        within = statistic <= self._plan.bound if self._plan.measure == "kl" else statistic >= self._plan.bound
        return RatioFigures(ratio, float(np.mean(kl)), max(kl), float(np.mean(top1)), min(top1), statistic, within)


def _statistic(values: Sequence[float], quantile: float | None) -> float:
    """The mean, or a quantile: the smallest value that at least this share of the values doesn't exceed."""
    if quantile is None:
        return float(np.mean(values))
    return float(np.quantile(values, quantile, method="inverted_cdf"))
