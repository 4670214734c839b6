"""How far the model's distributions over the next token, with reuse, are from those of full prefill."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Divergence:
    """What reuse changed at each target token.

    Attributes:
        kl: KL(full || reuse) in nats.
        same: whether both find the same token the likeliest. Among equally likely ones the smallest id counts.
    """

    kl: tuple[float, ...]
    same: tuple[bool, ...]

    @property
    def mean_kl(self) -> float:
        """Mean of `kl`: nats a token."""
        return sum(self.kl) / len(self.kl)

    @property
    def top1(self) -> float:
        """Share of the tokens that are `same`."""
        return sum(self.same) / len(self.same)

    @classmethod
    def of(cls, full: Iterable[Tensor], reuse: Iterable[Tensor]) -> Divergence:
        """Compare logits that come in blocks [tokens, vocab], of the same sizes from both. There is at least one token."""
        kl: list[float] = []
        same: list[bool] = []
        for p, q in zip(full, reuse, strict=True):
            kl += kl_divergence(p, q).tolist()
            same += (p.argmax(-1) == q.argmax(-1)).tolist()
        return cls(tuple(kl), tuple(same))


def kl_divergence(full: Tensor, reuse: Tensor) -> Tensor:
    """KL(full || reuse) in nats of each row of logits [tokens, vocab], in float32 [tokens].

    Tokens that full prefill rules out (logit -inf) add nothing. The result is never negative, whatever the rounding.
    """
    log_p, log_q = full.float().log_softmax(-1), reuse.float().log_softmax(-1)
    terms = torch.where(log_p == float("-inf"), 0.0, log_p.exp() * (log_p - log_q))
    return terms.sum(-1).clamp_min(0)
