"""Calibrated ratios in the store's folder, where later requests find them."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

from cachetune_rag.checking.arguments import is_number
from cachetune_rag.chunks.lead_ins import LeadIns
from cachetune_rag.measuring.calibration.result import Calibration
from cachetune_rag.measuring.profiles import Profiles
from cachetune_rag.reuse.config import resolve
from cachetune_rag.selection import get_selector
from cachetune_rag.selection.predictor import Predictor
from cachetune_store import ChunkStore, Namespace
from cachetune_store.printing import shown

KIND = "calibration"
REVISION = "selector_revision"
"""Under which name a calibration says for which `Selector.revision` it holds. Before there was one, it was 1."""

_log = logging.getLogger(__name__)


class SavedCalibrations:
    """The calibrated ratios of one engine: by model, tokenizer, dtype, lead-in, tenant, selector and codec.

    Args:
        profiles: keep them in the store's folder.
        lead_ins: know the namespace of the chunks that are stored.
        store: new chunks are stored with its codec.
        model_name: written beside a ratio, for people who read the file.
    """

    def __init__(self, profiles: Profiles, lead_ins: LeadIns, store: ChunkStore, model_name: str):
        self._profiles, self._lead_ins, self._store, self._model_name = profiles, lead_ins, store, model_name
        self._told: set[str] = set()

    def save(self, calibration: Calibration) -> Calibration:
        """Keep the result for this engine and later ones. Returns it with `saved` set; a store that can't be written is logged."""
        revision = get_selector(calibration.selector).revision
        record = {**calibration.as_dict(), "saved": True, "model_name": self._model_name, REVISION: revision}
        saved = self._profiles.keep(KIND, self.key(calibration.selector), record, "the calibrated ratio")
        return dataclasses.replace(calibration, saved=saved)

    def ratio(self, selector: str, namespace: Namespace | None = None) -> float | None:
        """The ratio that was saved for a selector, or for "auto". None if there is none, or what was saved is no ratio.

        One of an earlier revision of the selector is used, because it is still nearer to what was asked for than a default. The log says so.

        Args:
            selector: the selector's name.
            namespace: the namespace of a request's chunks. None: the one that chunks are stored under now.
        """
        selector = resolve(selector, 0).selector
        content = self._profiles.load(KIND, self.key(selector, namespace))
        self._check_revision(selector, content)
        ratio = None if content is None else content.get("ratio")
        return float(ratio) if is_number(ratio, 0, 1) else None

    def predictor(self, selector: str, namespace: Namespace | None = None) -> Predictor | None:
        """What predicts requests with a selector; None if none was calibrated, or with another revision of the selector, whose signs mean something
        else. Arguments as for `ratio`.
        """
        selector = resolve(selector, 0).selector
        content = self._profiles.load(KIND, self.key(selector, namespace))
        saved = None if content is None else content.get("predictor")
        if saved is None or not self._check_revision(selector, content):
            return None
        try:
            return Predictor.from_dict(saved)
        except (KeyError, TypeError, ValueError) as error:
            _log.warning("the prediction that was calibrated for %s is left out: %s. Calibrate again.", selector, error)
            return None

    def _check_revision(self, selector: str, content: Mapping[str, Any] | None) -> bool:
        """Whether a calibration is of the selector as it is now. If not, the log says so, once for each selector."""
        if content is None:
            return True
        then, now = content.get(REVISION, 1), get_selector(selector).revision
        if then != now and selector not in self._told:
            self._told.add(selector)
            _log.warning(
                "what was calibrated for selector %s is of its revision %s, and it is at %s: it chooses other tokens now. The calibrated ratio is still "
                "used, its prediction for max_kl and min_top1 is not. Calibrate again.",
                selector,
                shown(then),
                now,
            )
        return bool(then == now)

    def key(self, selector: str, namespace: Namespace | None = None) -> dict[str, str]:
        """Everything that a calibrated ratio depends on. The namespace stands for model, tokenizer, dtype, lead-ins and tenant."""
        namespace = namespace or self._lead_ins.namespace
        return {"namespace": namespace.digest, "selector": selector, "codec": self._store.codec}
