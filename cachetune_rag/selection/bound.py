"""A bound that a request asks for, and the ratio that is predicted to keep it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cachetune_rag.report import Prediction
from cachetune_rag.selection.predictor import Predictor


@dataclass(frozen=True)
class Bound:
    """How far from full prefill a request may be.

    Attributes:
        max_kl: most KL, in nats a token; None: any.
        min_top1: least top-1 agreement; None: any.
        predictor: predicts both.
    """

    max_kl: float | None
    min_top1: float | None
    predictor: Predictor

    def predict(self, errors_left: Sequence[float]) -> Prediction:
        """What is predicted at each of the predictor's ratios, by the error that each leaves, and the ratio to take."""
        found = self.predictor.predict(errors_left)
        kept = (each.ratio for each in found if self._keeps(each.kl, each.top1))
        return Prediction(self.max_kl, self.min_top1, self.predictor.share, found, next(kept, 1.0))

    def _keeps(self, kl: float, top1: float) -> bool:
        return (self.max_kl is None or kl <= self.max_kl) and (self.min_top1 is None or top1 >= self.min_top1)
