"""What is compared: full prefill, and reuse with several selectors, ratios and codecs."""

from __future__ import annotations

from collections.abc import Sequence

from fidelity.settings import EVERYTHING, Setting, grid

from cachetune_rag.reuse.config import AUTO

from .references import BFLOAT16, OTHER_ORDER, REFERENCES

FULL = Setting("-", "-", "full_prefill", 1.0)
"""The reference."""
_WORDS = {OTHER_ORDER: "full prefill, chunks in another order", BFLOAT16: "full prefill in bfloat16"}
SELECTORS = tuple(dict.fromkeys((AUTO.selector, "frequency", "chunk_head", "kv_deviation")))
RATIOS = (0.02, 0.05, 0.15, 0.30)


def compared(
    selectors: Sequence[str],
    ratios: Sequence[float],
    lead_ins: Sequence[str],
    codecs: Sequence[str],
    references: Sequence[str] = (),
) -> list[Setting]:
    """The settings of a run, full prefill first, then those of `REFERENCES` that are named. Ratio 0, with which all selectors do the same, is the selector `none`.

    Codecs other than `exact` are measured as in the benchmark of fidelity: with the default selector and the paper's, and only at the ratios
    0.05 and 0.15.
    """
    kept = [s for s in grid(selectors, ratios, lead_ins, codecs) if s.lead_in in lead_ins and s.selector != EVERYTHING]
    return [FULL, *(REFERENCES[name] for name in references), *kept]


def title(setting: Setting, default_lead_in: str = "auto") -> str:
    """A setting in a few words."""
    if setting == FULL:
        return "full prefill"
    if setting in _WORDS:
        return _WORDS[setting]
    words = f"`{setting.selector}`" + (f" r {setting.ratio:g}" if setting.ratio else "")
    words += "" if setting.codec == "exact" else f", {setting.codec}"
    return words + ("" if setting.lead_in == default_lead_in else f", lead-in {setting.lead_in}")
