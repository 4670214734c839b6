"""Watching fidelity in production: on a share of requests, full prefill of the same prompt after the answer is out."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cachetune_rag.answering.request import Finished, RequestListener
from cachetune_rag.checking.arguments import check_share
from cachetune_rag.concurrency.idle import IdleQueue
from cachetune_rag.concurrency.model_lock import ModelLock
from cachetune_rag.measuring.divergence import Divergence, kl_divergence
from cachetune_rag.measuring.teacher import rewind, teacher_forced
from cachetune_rag.model import ModelAdapter
from cachetune_rag.model.family.taps import StopForward
from cachetune_rag.report import Report

if TYPE_CHECKING:
    from cachetune_rag.reuse.state import PrefillState

PENDING = 2
"""Answers waiting to be compared; each keeps its prompt's KV where the model is."""
RECENT = 1000
"""Samples over which quantiles are taken."""

_log = logging.getLogger("cachetune_rag.fidelity")


@dataclass(frozen=True)
class KLStats:
    """KL(full || reuse) in nats: mean and largest over all samples, median and 95th percentile over the last `RECENT`."""

    mean: float
    max: float
    p50: float
    p95: float


@dataclass(frozen=True)
class FidelityStats:
    """What comparing answers with full prefill found.

    Attributes:
        samples: answers compared.
        dropped: answers chosen, but not compared: too many were waiting, or the engine was closed.
        errors: comparisons that failed; the reason is in the log.
        tokens: answer tokens compared.
        first_kl: of the answer's first token; None before the first sample.
        kl: of a sample's answer tokens, on average, each behind the answer so far (teacher-forced); None before the first.
        top1: share of all compared tokens at which both find the same token the likeliest; None before the first.
    """

    samples: int
    dropped: int
    errors: int
    tokens: int
    first_kl: KLStats | None
    kl: KLStats | None
    top1: float | None


@dataclass(frozen=True, eq=False)
class _AnswerToCompare:
    state: PrefillState
    tokens: tuple[int, ...]


class FidelitySampler(RequestListener):
    """Chooses answers, keeps them until the model is idle, and compares them on a thread of its own.

    A request never waits for it: a comparison begins when no request is in flight. If a request arrives meanwhile, the comparison
    stops between two layers and begins anew later.

    Args:
        share: of the answers with something reused, in [0, 1]. Which ones is a matter of counting, not of chance.
        adapter, lock: the model.
        check: refuses a model whose weights were changed.

    Attributes:
        queue: the answers that are to be compared.

    Raises:
        ConfigError: share is out of range.
    """

    def __init__(self, share: Any, adapter: ModelAdapter, lock: ModelLock, check: Callable[[], None] = lambda: None):
        check_share(share, "fidelity_sample", "a share of the requests, a number from 0 (none) to 1 (all)")
        self._share, self._adapter, self._model, self._check = float(share), adapter, lock, check
        self.queue: IdleQueue[_AnswerToCompare] = IdleQueue(
            "cachetune-fidelity", lock, self._attempt, self._count_dropped
        )
        # Guarded by the queue's mutex:
        self._answers = self._samples = self._dropped = self._errors = self._tokens = self._same = 0
        self._first, self._kl = _Series(), _Series()

    def offer(self, state: PrefillState, answer: Sequence[int]) -> None:
        """Perhaps choose a finished answer for comparison. Returns at once.

        Args:
            state: what the answer was decoded from. Its cache belongs to the sampler from here on.
            answer: the answer's tokens.
        """
        report = state.report
        if not self._share or report.full or not report.reused or not answer:
            return
        with self.queue.mutex:
            self._answers += 1
            if math.floor(self._answers * self._share) == math.floor((self._answers - 1) * self._share):
                return
            if len(self.queue) >= PENDING or not self.queue.put(_AnswerToCompare(state, tuple(answer))):
                self._dropped += 1

    def finished(self, end: Finished) -> Report:
        """Perhaps choose a complete answer for comparison. One whose prompt was read again is full prefill's in part, and its first reading is gone."""
        if end.answer is not None and end.report.read_again is None:
            self.offer(end.state, end.answer.token_ids)
        return end.report

    def stats(self) -> FidelityStats | None:
        """What was found so far; None if nothing is sampled."""
        if not self._share:
            return None
        with self.queue.mutex:
            top1 = self._same / self._tokens if self._tokens else None
            return FidelityStats(
                self._samples,
                self._dropped,
                self._errors,
                self._tokens,
                self._first.stats(),
                self._kl.stats(),
                top1,
            )

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until all chosen answers are compared. Returns False if that took longer than `timeout` seconds."""
        return self.queue.wait(timeout)

    def drop(self) -> None:
        """Leave out the chosen answers, because the model's weights were changed since they were given. The caller holds the model's lock."""
        with self.queue.mutex:
            self.queue.clear()

    def close(self) -> None:
        """Leave out the chosen answers and choose no more. A comparison under way ends at its next layer."""
        self.queue.drop()

    # -- the queue's thread ---------------------------------------------------------------------------------------

    def _attempt(self, chosen: _AnswerToCompare) -> None:
        """Compare an answer, unless a request comes in between. Whatever goes wrong, no request is told of it."""
        if not self.queue.wait_idle():
            return
        try:
            compared = self._compare_in_background(chosen)
        except Exception as error:
            request = chosen.state.report.request_id
            _log.warning("the fidelity of request %s is not known: %s: %s", request, type(error).__name__, error)
            with self.queue.mutex:
                self._errors += self.queue.done(chosen)
        else:
            if compared is not None:
                self._add(chosen, *compared)

    def _compare_in_background(self, chosen: _AnswerToCompare) -> tuple[float, Divergence] | None:
        """KL of the first token, and the whole answer's divergence; None if a request came in between."""
        with self._model.background() as held:
            if not held or not self._waits(chosen):
                return None
            try:
                with self._adapter.interruptible(lambda: self.queue.dropped or self._model.wanted):
                    self._check()
                    compared = self._compare(chosen)
                    self._check()
                    return compared
            except StopForward:
                return None

    def _waits(self, chosen: _AnswerToCompare) -> bool:
        """Whether an answer is still to be compared. Asked under the model's lock: `drop` can't come in between."""
        with self.queue.mutex:
            return self.queue.is_first(chosen)

    def _count_dropped(self, chosen: _AnswerToCompare) -> None:
        self._dropped += 1

    def _compare(self, chosen: _AnswerToCompare) -> tuple[float, Divergence]:
        adapter, state = self._adapter, chosen.state
        ids = torch.tensor(state.prompt.ids, dtype=torch.int64, device=adapter.device)
        rewind(state.cache, len(ids))
        logits, cache = adapter.full_forward(ids)
        full = teacher_forced(adapter, logits, cache, chosen.tokens)
        reuse = teacher_forced(adapter, state.logits, state.cache, chosen.tokens)
        divergence = Divergence.of(full, reuse)
        if not all(map(math.isfinite, divergence.kl)):
            raise ArithmeticError("the model gives logits that are no numbers")
        return float(kl_divergence(logits, state.logits)), divergence

    def _add(self, chosen: _AnswerToCompare, first: float, divergence: Divergence) -> None:
        with self.queue.mutex:
            if not self.queue.done(chosen):
                return
            self._samples += 1
            self._tokens += len(divergence.same)
            self._same += sum(divergence.same)
            self._first.add(first)
            self._kl.add(divergence.mean_kl)
        _log.info(
            "fidelity of request %s: %d prompt tokens, %s, r=%g: KL %.4g at the first token, %.4g a token over %d answer tokens, "
            "top-1 agreement %.3f",
            chosen.state.report.request_id,
            len(chosen.state.prompt.ids),
            chosen.state.report.selector,
            chosen.state.report.ratio,
            first,
            divergence.mean_kl,
            len(divergence.same),
            divergence.top1,
        )


class _Series:
    """Mean and largest of all values, and the last ones."""

    def __init__(self) -> None:
        self._count, self._sum, self._max = 0, 0.0, 0.0
        self._last: deque[float] = deque(maxlen=RECENT)

    def add(self, value: float) -> None:
        self._count += 1
        self._sum += value
        self._max = max(self._max, value)
        self._last.append(value)

    def stats(self) -> KLStats | None:
        if not self._count:
            return None
        p50, p95 = np.quantile(list(self._last), [0.5, 0.95]).tolist()
        return KLStats(self._sum / self._count, self._max, p50, p95)
