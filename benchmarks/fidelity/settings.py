"""What is compared: selectors, ratios, lead-ins and codecs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cachetune_rag.reuse.config import AUTO
from cachetune_rag.selection import selector_names

RATIOS = (0.02, 0.05, 0.10, 0.15, 0.30, 0.50)
LEAD_INS = ("first_token", "auto")
NOTHING, EVERYTHING = "none", "all"
"""The selectors of ratio 0 and 1. With these ratios, all others do the same as they do."""


@dataclass(frozen=True, order=True)
class Setting:
    """One way to serve a prompt.

    Attributes:
        lead_in: "first_token" (the paper's), or "auto" (the engine's default, chosen from the corpus).
        codec: of the store.
        selector: a registered name.
        ratio: share of the chunk tokens to recompute.
    """

    lead_in: str
    codec: str
    selector: str
    ratio: float


BASELINE = Setting("first_token", "exact", NOTHING, 0.0)
"""What shares are measured against: nothing is recomputed, and the first token alone is the lead-in."""


def compared_selectors() -> list[str]:
    """All registered selectors but those for the ratios 0 and 1."""
    return [name for name in selector_names() if name not in (NOTHING, EVERYTHING)]


def grid(
    selectors: Sequence[str], ratios: Sequence[float], lead_ins: Sequence[str], codecs: Sequence[str]
) -> list[Setting]:
    """The settings of a run. Those that use the same stored KV stand together.

    The codec `exact` is measured with everything. Other codecs are measured only with the default lead-in, the default selector and the
    paper's, and the ratios 0.05 and 0.15, because their error hardly depends on anything else.
    """
    settings = [BASELINE, Setting("first_token", "exact", EVERYTHING, 1.0)]
    inner = [r for r in ratios if 0 < r < 1]
    for lead_in in lead_ins:
        settings.append(Setting(lead_in, "exact", NOTHING, 0.0))
        settings += [Setting(lead_in, "exact", s, r) for s in selectors for r in inner]
    few = [s for s in dict.fromkeys((AUTO.selector, "frequency")) if s in selectors]
    lead_in = lead_ins[-1]
    for codec in codecs:
        if codec != "exact":
            settings.append(Setting(lead_in, codec, NOTHING, 0.0))
            settings += [Setting(lead_in, codec, s, r) for s in few for r in inner if r in (0.05, 0.15)]
    return list(dict.fromkeys(settings))
