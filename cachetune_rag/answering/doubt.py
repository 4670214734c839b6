"""Doubts a reading of a prompt with reuse as soon as the model is not sure of a token of the answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Step = Callable[[int], Tensor]
"""Appends a token to the cache and gives the logits [1, vocab] that follow it."""
ReadAgain = Callable[[Sequence[int], float], tuple[Tensor, Step]]
"""Reads the prompt and the answer's tokens so far without reuse, given these tokens and how sure the model was of the next one. Gives the
logits by which that one is to be chosen, and the steps that go on from there."""


class DoubtingSteps:
    """Decoding steps behind a prompt that was read with reuse. At the first token that the model is not sure of, the prompt is read again,
    and the answer goes on behind that, which nothing doubts any more.

    It looks at the model's own logits, before processors change them and before a token is drawn. So it doesn't depend on the settings of
    sampling, and a seed draws the same numbers with it and without.

    Args:
        step: the steps behind the prompt as it was read with reuse. Nothing holds them any more once the prompt is read again.
        least: the least probability that the model has to give to its likeliest token.
        read_again: see there.
    """

    def __init__(self, step: Step, least: float, read_again: ReadAgain):
        self._step: Step | None = step
        self._least, self._read_again = least, read_again
        self._said: list[int] = []
        self._doubts = True

    def first(self, logits: Tensor) -> Tensor:
        """The logits by which the answer's first token is chosen, by those of the prompt's last one."""
        return self._looked_at(logits)

    def __call__(self, token: int) -> Tensor:
        """The logits [1, vocab] by which the token behind this one is chosen."""
        assert self._step is not None
        if not self._doubts:
            return self._step(token)
        self._said.append(token)
        return self._looked_at(self._step(token))

    def _looked_at(self, logits: Tensor) -> Tensor:
        sure = sureness(logits)
        if not sure < self._least:  # also logits that are no numbers, which are refused when a token is chosen
            return logits
        # The memory of the first reading is free before the second one takes its own.
        self._doubts, self._step = False, None
        logits, self._step = self._read_again(tuple(self._said), sure)
        return logits


@torch.no_grad()
def sureness(logits: Tensor) -> float:
    """The probability of the likeliest token, by logits [1, vocab]."""
    logits = logits.float()
    return float((logits.amax(-1) - logits.logsumexp(-1)).exp())
