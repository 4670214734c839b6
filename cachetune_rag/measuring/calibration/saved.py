"""Calibrated ratios in the store's folder, where later requests find them."""

from __future__ import annotations

import dataclasses
import logging

from cachetune_rag.checking.arguments import is_number
from cachetune_rag.chunks.lead_ins import LeadIns
from cachetune_rag.measuring.calibration.result import Calibration
from cachetune_rag.measuring.profiles import Profiles
from cachetune_rag.reuse.config import resolve
from cachetune_rag.selection.predictor import Predictor
from cachetune_store import ChunkStore, Namespace

KIND = "calibration"

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

    def save(self, calibration: Calibration) -> Calibration:
        """Keep the result for this engine and later ones. Returns it with `saved` set; a store that can't be written is logged."""
        record = {**calibration.as_dict(), "saved": True, "model_name": self._model_name}
        saved = self._profiles.keep(KIND, self.key(calibration.selector), record, "the calibrated ratio")
        return dataclasses.replace(calibration, saved=saved)

    def ratio(self, selector: str, namespace: Namespace | None = None) -> float | None:
        """The ratio that was saved for a selector, or for "auto". None if there is none, or what was saved is no ratio.

        Args:
            selector: the selector's name.
            namespace: the namespace of a request's chunks. None: the one that chunks are stored under now.
        """
        content = self._profiles.load(KIND, self.key(resolve(selector, 0).selector, namespace))
        ratio = None if content is None else content.get("ratio")
        return float(ratio) if is_number(ratio, 0, 1) else None

    def predictor(self, selector: str, namespace: Namespace | None = None) -> Predictor | None:
        """What predicts requests with a selector; None if none was calibrated. Arguments as for `ratio`."""
        key = self.key(resolve(selector, 0).selector, namespace)
        content = self._profiles.load(KIND, key)
        saved = None if content is None else content.get("predictor")
        if saved is None:
            return None
        try:
            return Predictor.from_dict(saved)
        except (KeyError, TypeError, ValueError) as error:
            _log.warning("the prediction that was calibrated for %s is left out: %s. Calibrate again.", selector, error)
            return None

    def key(self, selector: str, namespace: Namespace | None = None) -> dict[str, str]:
        """Everything that a calibrated ratio depends on. The namespace stands for model, tokenizer, dtype, lead-ins and tenant."""
        namespace = namespace or self._lead_ins.namespace
        return {"namespace": namespace.digest, "selector": selector, "codec": self._store.codec}
