"""What a selector chose for one request, and the error that its choice leaves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cachetune_rag.report import Prediction


@dataclass(frozen=True)
class Choice:
    """The tokens that a request recomputes.

    Attributes:
        places: their places in the prompt, int64, in any order.
        ratio: the share of the chunk tokens that was asked for.
        error_left: the sum of the scores of the chunk tokens that are reused; None where nothing was scored.
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
