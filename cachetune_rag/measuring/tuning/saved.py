"""Tunings in the store's folder, and their use by requests."""

from __future__ import annotations

import dataclasses
import logging
import platform
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from cachetune_rag.chunks.lead_ins import LeadIns
from cachetune_rag.measuring.profiles import Profiles
from cachetune_rag.measuring.tuning.result import TierTuning
from cachetune_rag.model import ModelAdapter
from cachetune_rag.reuse.config import ReuseConfig
from cachetune_rag.selection import names
from cachetune_store import Namespace
from cachetune_store.tier_kinds import KINDS, rank

KIND = "tuning"

_log = logging.getLogger(__name__)


class SavedTunings:
    """The tunings of one engine: by model, hardware, tier, codec and selector.

    Args:
        profiles: keep them in the store's folder.
        adapter: the model that was timed.
        lead_ins: know the namespace, which names the model.
        calibrated: gives the ratio that was calibrated for a selector and a namespace, or None.
    """

    def __init__(
        self,
        profiles: Profiles,
        adapter: ModelAdapter,
        lead_ins: LeadIns,
        calibrated: Callable[[str, Namespace | None], float | None],
    ):
        self._profiles, self._adapter, self._lead_ins, self._calibrated = profiles, adapter, lead_ins, calibrated
        self._known: dict[tuple[str, str, str], TierTuning | None] = {}

    def forget(self) -> None:
        """Drop what was read from the store, because the model's weights have changed."""
        self._known.clear()

    @property
    def hardware(self) -> str:
        """What times depend on besides the model: the GPU and whether kernels are used, or the processor and its threads."""
        adapter = self._adapter
        if adapter.device.type == "cuda":
            return f"{torch.cuda.get_device_name(adapter.device)}{', kernels' if adapter.cuda_kernels else ''}"
        return f"{_processor()}, {torch.get_num_threads()} threads"

    @property
    def machine(self) -> str:
        """`hardware` as people are told it. The key keeps its old spelling, "1 threads", so that what was saved under it is still found."""
        return self.hardware.removesuffix("s") if self.hardware.endswith(", 1 threads") else self.hardware

    def save(self, tuning: TierTuning) -> TierTuning:
        """Keep a tuning for this engine and later ones. Returns it with `saved` set; a store that can't be written is logged."""
        place = tuning.tier, tuning.codec, tuning.selector
        self._known[place] = tuning
        content = dataclasses.replace(tuning, saved=True).as_dict()
        return dataclasses.replace(
            tuning, saved=self._profiles.keep(KIND, self.key(*place), content, "the tuned ratio")
        )

    def load(self, tier: str, codec: str, selector: str) -> TierTuning | None:
        """What was saved for a tier, codec and selector. None if nothing was, or its file holds something else, which is logged."""
        place = tier, codec, selector
        if place not in self._known:
            content = self._profiles.load(KIND, self.key(*place))
            try:
                self._known[place] = None if content is None else TierTuning.from_dict(content)
            except (KeyError, TypeError, ValueError) as error:
                _log.warning("the tuning of %s (%s, %s) is left out: %s. Tune again.", *place, error)
                self._known[place] = None
        return self._known[place]

    def apply(self, config: ReuseConfig, tier: str, codec: str) -> ReuseConfig:
        """The settings of a request that left the ratio to the engine, for chunks of a tier and codec.

        A tuning whose ratio is below a floor that was calibrated later is not used until the engine is tuned again.
        """
        tuning = self.load(tier, codec, config.selector)
        place = rank(tier)
        while tuning is None and place < len(KINDS) and KINDS[place].copies:
            # Where a tier of copies was not tuned, the next slower tier's setting is used: its rows, too, arrive while the model computes.
            place += 1
            tuning = self.load(KINDS[place].name, codec, config.selector)
        if tuning is None or not self._keeps_floor(tuning, config.namespace):
            return config
        return dataclasses.replace(config, ratio=tuning.ratio, skipped=tuning.skipped)

    def _keeps_floor(self, tuning: TierTuning, namespace: Namespace | None) -> bool:
        """Whether what the selector chooses is as large as was calibrated for it: its share of r, or all of r if the offline ranking chooses."""
        offline = tuning.skipped == tuning.ratio
        floor = self._calibrated(names.OFFLINE if offline else tuning.selector, namespace)
        # Ratios that are searched are rounded, so a difference of 0.001 is none.
        return floor is None or tuning.ratio - (0 if offline else tuning.skipped) >= floor - 1e-3

    def key(self, tier: str, codec: str, selector: str) -> dict[str, str]:
        """What a tuned ratio is saved under: all that it depends on."""
        namespace = self._lead_ins.known_namespace  # model and dtype don't change when lead-ins are chosen
        return {
            "model": namespace.model,
            "dtype": namespace.dtype,
            "hardware": self.hardware,
            "tier": tier,
            "codec": codec,
            "selector": selector,
        }


@cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
