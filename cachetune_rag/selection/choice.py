"""What a selector chose for one request, and the error that its choice leaves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cachetune_rag.report import Prediction


@dataclass(frozen=True)
class Choice:
    """The tokens that a request recomputes.

    Attributes:
        places: their places in the prompt, int64, in any order.
        ratio: the share of the chunk tokens that was asked for.
        error_left: the sum of the scores of the chunk tokens that are reused (`ErrorLeft`); None where nothing was scored.
        sign: that error times how unsure the next token is, by which KL is predicted. None where nobody asked for it, and for full prefill.
        prediction: by which the ratio was taken; None where the request has no bound.
    """

    places: Tensor
    ratio: float
    error_left: float | None = None
    sign: float | None = None
    prediction: Prediction | None = None


def unsureness(logits: Tensor) -> float:
    """The entropy of the next token in nats, from its logits [vocab].

    The same error changes a distribution little whose first token is nearly certain, and much one with many likely tokens.
    """
    log_p = logits.float().log_softmax(-1)
    return float(-(log_p.exp() * log_p.clamp_min(torch.finfo(torch.float32).min)).sum())


class ErrorLeft:
    """How much of a request's scores would be left on reused tokens, for any number of recomputed ones.

    A score says how much a token's stored keys and values are expected to disturb the query, so what is left says how far off the request will be.

    Args:
        scores: of the tokens that can be chosen, float [tokens].
    """

    def __init__(self, scores: NDArray[np.float32]):
        # Recomputed tokens are those with the largest scores, so what is left is a sum over the smallest ones.
        self._left = np.concatenate([[0.0], np.cumsum(np.sort(scores), dtype=np.float64)])

    def behind(self, counts: Sequence[int]) -> list[float]:
        """What is left when so many tokens are recomputed, for each of several numbers."""
        last = len(self._left) - 1
        return [float(self._left[last - count]) for count in counts]
