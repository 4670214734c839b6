"""Calibrated ratios: what a calibration found, and where later requests find it again."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cachetune_rag.reuse.config import resolve
from cachetune_store import ChunkStore, Namespace, StoreError, StoreReadOnlyError

if TYPE_CHECKING:
    from cachetune_rag.runtime import Runtime

KIND = "calibration"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RatioFigures:
    """What one ratio did to the samples.

    Attributes:
        ratio: share of the chunk tokens that was recomputed.
        kl: KL(full || reuse) in nats a target token; the mean over samples of each sample's mean.
        kl_worst: the largest sample's mean.
        top1: share of target tokens that reuse finds likeliest as well; mean over samples.
        top1_worst: the smallest sample's share.
        statistic: what is held against the bound.
        within: whether it stays within.
    """

    ratio: float
    kl: float
    kl_worst: float
    top1: float
    top1_worst: float
    statistic: float
    within: bool


@dataclass(frozen=True)
class Calibration:
    """The result of `CacheTune.calibrate`.

    Attributes:
        ratio: the smallest measured ratio that keeps the bound, as do all larger ones measured; 1.0 (everything is computed: exact) if
            there is none.
        met: whether there is one below 1.
        selector: whose ratio it is.
        measure, bound: "kl" and the most nats a token, or "top1" and the least share of tokens.
        quantile: None: the mean over samples keeps the bound; q: at least this share of the samples does, each by itself.
        samples: prompts measured.
        target_tokens: tokens measured, over all samples.
        figures: by ratio, ascending.
        saved: whether later engines on the store will find it (False for a store in memory, or one that can't be written).
    """

    ratio: float
    met: bool
    selector: str
    measure: str
    bound: float
    quantile: float | None
    samples: int
    target_tokens: int
    figures: tuple[RatioFigures, ...]
    saved: bool = False

    def as_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return dataclasses.asdict(self)


def choose(figures: Sequence[RatioFigures]) -> float | None:
    """The smallest ratio that is within the bound with all larger ones.

    More recomputation is not closer every single time, on a few samples least of all. A ratio that happens to dip below the
    bound between others that don't is no floor: the tuner goes upwards from here.
    """
    found = None
    for each in sorted(figures, key=lambda f: -f.ratio):
        if not each.within:
            break
        found = each.ratio
    return found


def check_savable(store: ChunkStore, what: str) -> None:
    """Refuse to measure what couldn't be saved.

    Raises:
        StoreReadOnlyError: the store can't be written.
    """
    if store.read_only:
        raise StoreReadOnlyError(
            f"the store {store.path} can only be read here, so the {what} ratio could not be saved in it: nothing was measured. "
            "Measure where this user may write the store, or pass ratio= with each request"
        )


class SavedCalibrations:
    """The calibrated ratios of one engine: by model, tokenizer, dtype, lead-in, tenant, selector and codec."""

    def __init__(self, engine: Runtime):
        self._engine = engine

    def save(self, calibration: Calibration) -> Calibration:
        """Keep the result for this engine and later ones. A store that can't be written is logged, and `saved` is False."""
        engine = self._engine
        record = {**calibration.as_dict(), "saved": True, "model_name": engine.model_name}
        try:
            path = engine.profiles.save(KIND, self._key(calibration.selector), record)
        except StoreError as error:
            _log.warning("the calibrated ratio holds for this engine only, since it could not be saved: %s", error)
            return calibration
        return dataclasses.replace(calibration, saved=path is not None)

    def ratio(self, selector: str, namespace: Namespace | None = None) -> float | None:
        """The ratio that was saved for a selector or "auto"; None if there is none (or none that makes sense).

        Args:
            selector: whose ratio.
            namespace: of the chunks that it is asked for; None: of those that are stored now.
        """
        content = self._engine.profiles.load(KIND, self._key(resolve(selector, 0).selector, namespace))
        ratio = None if content is None else content.get("ratio")
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 <= ratio <= 1:
            return None
        return float(ratio)

    def _key(self, selector: str, namespace: Namespace | None = None) -> dict[str, str]:
        """What a calibrated ratio depends on; the namespace is model, tokenizer, dtype, lead-in and tenant."""
        engine = self._engine
        return {"namespace": (namespace or engine.namespace).digest, "selector": selector, "codec": engine.store.codec}
