"""How a request's ratio is found when its tokens are scored, instead of being given: for a bound, and while calibration looks on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from cachetune_rag.report import Prediction
from cachetune_rag.selection.predictor import Predictor


class RatioFinder(Protocol):
    """Finds a request's ratio by its signs (`Choice.sign`)."""

    @property
    def ratios(self) -> tuple[float, ...]:
        """Those that it chooses from, beside 1 (full prefill). Empty: the ratio is given, and its sign is wanted nevertheless."""

    def find(self, signs: Sequence[float]) -> tuple[float | None, Prediction | None]:
        """The ratio, and by which prediction it was taken; None: the one that is given. `signs` are those of the ratios."""


@dataclass(frozen=True)
class SignOnly:
    """The ratio is given, and only the request's sign is taken."""

    ratios: tuple[float, ...] = ()

    def find(self, signs: Sequence[float]) -> tuple[float | None, Prediction | None]:
        """See `RatioFinder.find`."""
        return None, None


@dataclass(frozen=True)
class Bound:
    """How far from full prefill a request may be.

    Attributes:
        max_kl: most KL of the answer's first token, in nats; None: any.
        min_top1: least probability that full prefill, too, finds this token the likeliest; None: any.
        predictor: predicts both.
    """

    max_kl: float | None
    min_top1: float | None
    predictor: Predictor

    @property
    def ratios(self) -> tuple[float, ...]:
        """See `RatioFinder.ratios`."""
        return self.predictor.ratios

    def find(self, signs: Sequence[float]) -> tuple[float, Prediction]:
        """The least ratio that is predicted to keep the bound; 1 if none is."""
        ladder = self.predictor.predict(signs)
        ratio = next((each.ratio for each in ladder if self._keeps(each.kl, each.top1)), 1.0)
        return ratio, Prediction(self.max_kl, self.min_top1, self.predictor.share, ladder, ratio)

    def _keeps(self, kl: float, top1: float) -> bool:
        return (self.max_kl is None or kl <= self.max_kl) and (self.min_top1 is None or top1 >= self.min_top1)
