"""Watching fidelity in production: on a share of requests, full prefill of the same prompt after the answer is out."""

from __future__ import annotations

import atexit
import logging
import math
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cachetune_rag.answering.request import Finished, RequestListener
from cachetune_rag.checking.arguments import check_share
from cachetune_rag.concurrency.forks import this_process
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
IDLE_SECONDS = 0.05
"""How long no request must have wanted the model before a comparison begins."""
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


@dataclass(frozen=True)
class _Sample:
    state: PrefillState
    answer: tuple[int, ...]


class FidelitySampler(RequestListener):
    """Chooses answers, keeps them until the model is idle, and compares them on a thread of its own.

    A request never waits for it: a comparison begins when no request is in flight, and gives way between two layers when one
    arrives, to begin anew later.

    Args:
        share: of the answers with something reused, in [0, 1]. Which ones is a matter of counting, not of chance.
        adapter, lock: the model.
        check: refuses a model whose weights were changed.

    Raises:
        ConfigError: share is out of range.
    """

    def __init__(self, share: Any, adapter: ModelAdapter, lock: ModelLock, check: Callable[[], None] = lambda: None):
        check_share(share, "fidelity_sample", "a share of the requests, a number from 0 (none) to 1 (all)")
        self._share, self._adapter, self._model, self._check = float(share), adapter, lock, check
        self._mutex = threading.Lock()
        self._pending: deque[_Sample] = deque()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._origin = this_process()
        self._answers = self._samples = self._dropped = self._errors = self._tokens = self._same = 0
        self._first, self._kl = _Series(), _Series()

    def offer(self, state: PrefillState, answer: Sequence[int]) -> None:
        """A finished answer (its tokens) and what it was decoded from, whose cache belongs to the sampler from here on.

        Returns at once.
        """
        report = state.report
        if not self._share or report.full or not report.reused or not answer:
            return
        with self._mutex:
            self._answers += 1
            if math.floor(self._answers * self._share) == math.floor((self._answers - 1) * self._share):
                return
            if self._closed or len(self._pending) >= PENDING:
                self._dropped += 1
                return
            self._pending.append(_Sample(state, tuple(answer)))
            # A thread that Ctrl-C kept from starting isn't alive.
            if self._thread is None or not self._thread.is_alive():
                # A thread inside of torch while the interpreter goes away would crash the process.
                atexit.register(self.close)
                self._thread = threading.Thread(target=self._run, name="cachetune-fidelity", daemon=True)
                self._thread.start()

    def finished(self, end: Finished) -> Report:
        """Perhaps choose a complete answer for comparison."""
        if end.answer is not None:
            self.offer(end.state, end.answer.token_ids)
        return end.report

    def stats(self) -> FidelityStats | None:
        """What was found so far; None if nothing is sampled."""
        if not self._share:
            return None
        with self._mutex:
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
        """Wait until nothing is pending; False if that took longer than `timeout` seconds."""
        with self._mutex:
            thread = self._thread
        if thread is None:
            return True
        thread.join(timeout)
        return not thread.is_alive()

    def drop(self) -> None:
        """Leave out what is pending: it was answered by other weights than the model has now. The caller holds the model's lock."""
        with self._mutex:
            self._dropped += len(self._pending)
            self._pending.clear()

    def close(self) -> None:
        """Drop what is pending, and end what runs at its next layer."""
        if not self._origin.here:
            return
        with self._mutex:
            self._closed = True
            thread = self._thread
        self._model.wake()
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    # -- the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        """Compare what is pending; the thread ends when nothing is."""
        while True:
            with self._mutex:
                if self._closed:
                    self._dropped += len(self._pending)
                    self._pending.clear()
                if not self._pending:
                    self._thread = None
                    atexit.unregister(self.close)
                    return
                sample = self._pending[0]
            if not self._model.wait_idle(IDLE_SECONDS, lambda: self._closed):
                continue
            try:
                compared = self._attempt(sample)
            except Exception as error:  # whatever it is, it must not reach a request
                request = sample.state.report.request_id
                _log.warning("the fidelity of request %s is not known: %s: %s", request, type(error).__name__, error)
                with self._mutex:
                    self._errors += self._take(sample)
            else:
                if compared is not None:
                    self._add(sample, *compared)
            del sample  # with its KV

    def _attempt(self, sample: _Sample) -> tuple[float, Divergence] | None:
        """KL of the first token, and the whole answer's divergence; None if a request came in between."""
        with self._model.background() as held:
            if not held or not self._waits(sample):
                return None
            try:
                with self._adapter.interruptible(lambda: self._closed or self._model.wanted):
                    self._check()
                    compared = self._compare(sample)
                    self._check()
                    return compared
            except StopForward:
                return None

    def _waits(self, sample: _Sample) -> bool:
        with self._mutex:
            return bool(self._pending) and self._pending[0] is sample

    def _take(self, sample: _Sample) -> bool:
        """Remove a sample whose comparison has ended; False if `drop` has removed it, and counted it. The caller holds the mutex."""
        if not self._pending or self._pending[0] is not sample:
            return False
        self._pending.popleft()
        return True

    def _compare(self, sample: _Sample) -> tuple[float, Divergence]:
        adapter, state = self._adapter, sample.state
        ids = torch.tensor(state.prompt.ids, dtype=torch.int64, device=adapter.device)
        rewind(state.cache, len(ids))
        logits, cache = adapter.full_forward(ids)
        full = teacher_forced(adapter, logits, cache, sample.answer)
        reuse = teacher_forced(adapter, state.logits, state.cache, sample.answer)
        divergence = Divergence.of(full, reuse)
        if not all(map(math.isfinite, divergence.kl)):
            raise ArithmeticError("the model gives logits that are no numbers")
        return float(kl_divergence(logits, state.logits)), divergence

    def _add(self, sample: _Sample, first: float, divergence: Divergence) -> None:
        with self._mutex:
            if not self._take(sample):
                return
            self._samples += 1
            self._tokens += len(divergence.same)
            self._same += sum(divergence.same)
            self._first.add(first)
            self._kl.add(divergence.mean_kl)
        _log.info(
            "fidelity of request %s: %d prompt tokens, %s, r=%g: KL %.4g at the first token, %.4g a token over %d answer tokens, "
            "top-1 agreement %.3f",
            sample.state.report.request_id,
            len(sample.state.prompt.ids),
            sample.state.report.selector,
            sample.state.report.ratio,
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
