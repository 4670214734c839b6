"""When the thread that puts prompts together may compute, and when vLLM is told that prompts are ready."""

from __future__ import annotations

import threading
from typing import Protocol

import torch

from cachetune_vllm.divided_heads import DividedHeads, HeadsInTurns
from cachetune_vllm.served_model import ServedModel


class Pace(Protocol):
    """How a worker's thread runs beside vLLM's. Its methods but `failed` are called by vLLM's thread.

    Attributes:
        changed: guards what the two threads tell each other, and is notified when there may be something to do in `step`.
    """

    changed: threading.Condition

    def stream(self, device: torch.device) -> torch.cuda.Stream:
        """The stream that prompts are put together on."""

    def step(self, given: int, ended: int, idle: bool) -> tuple[int, bool]:
        """One of vLLM's steps. It may be called several times in one.

        Args:
            given: prompts that were handed to the thread so far.
            ended: how many of them it has ended.
            idle: vLLM has nothing to compute in this step.

        Returns:
            How many of them vLLM may be told of, and whether the thread had a turn. Workers that share a model get the same.
        """

    @property
    def waits(self) -> bool:
        """Whether the thread waits for `step`."""

    def failed(self, error: BaseException) -> None:
        """A prompt could not be put together; called by the thread."""

    def end(self) -> None:
        """The thread is to end."""


class OwnPace:
    """The thread runs freely: for a model that this worker has as a whole.

    Args:
        apart: whether it has a stream of its own. Modules of vLLM that both threads call must not run on two streams at once: some kernels
            for quantised weights (Marlin) count finished blocks in memory that belongs to the layer, or to the whole process. On vLLM's
            stream, one call ends before the next begins, whichever thread made it.
    """

    def __init__(self, apart: bool):
        self.changed, self._apart = threading.Condition(), apart

    def stream(self, device: torch.device) -> torch.cuda.Stream:
        """See `Pace`."""
        return torch.cuda.Stream(device) if self._apart else torch.cuda.current_stream(device)

    def step(self, given: int, ended: int, idle: bool) -> tuple[int, bool]:
        """See `Pace`."""
        return ended, False

    @property
    def waits(self) -> bool:
        """See `Pace`."""
        return False

    def failed(self, error: BaseException) -> None:
        """See `Pace`. Nobody else is concerned."""

    def end(self) -> None:
        """See `Pace`."""


class SharedPace:
    """Prompts are put together in turns with vLLM's steps (`turns.py`): the same ones by all workers that share a model.

    Args:
        heads: this worker's.
        amount: rows that may be added up in the turn of a step in which vLLM computes; None: any number.
    """

    def __init__(self, heads: DividedHeads | HeadsInTurns, amount: int | None):
        self._heads, self._amount, self.changed = heads, amount, heads.turns.changed
        self._agreed = 0

    def stream(self, device: torch.device) -> torch.cuda.Stream:
        """See `Pace`. It is vLLM's own, so that collective calls have one order."""
        return torch.cuda.current_stream(device)

    def step(self, given: int, ended: int, idle: bool) -> tuple[int, bool]:
        """See `Pace`."""
        turns, lent = self._heads.turns, False
        turns.check()
        if given > self._agreed:
            said = self._heads.in_step((ended, turns.wanted))
            self._agreed = min(ends for ends, _ in said)
            lent = all(wanted for _, wanted in said)
            if lent:
                turns.lend(None if idle else self._amount)
        return self._agreed, lent

    @property
    def waits(self) -> bool:
        """See `Pace`."""
        return self._heads.turns.wanted

    def failed(self, error: BaseException) -> None:
        """See `Pace`."""
        if not self._heads.raised_on_all(error):
            self._heads.turns.out_of_step(error)

    def end(self) -> None:
        """See `Pace`."""
        self._heads.turns.end()


def pace_of(served: ServedModel, amount: int | None) -> Pace:
    """The pace of a worker with this model; for `amount`, see `SharedPace`."""
    if isinstance(served.heads, DividedHeads | HeadsInTurns):
        return SharedPace(served.heads, amount)
    return OwnPace(apart=served.form == "dense")
