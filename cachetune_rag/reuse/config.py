"""Settings that decide what is recomputed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cachetune_rag.checking.arguments import check_share
from cachetune_rag.errors import ConfigError
from cachetune_rag.selection import get_selector, names, selector_names
from cachetune_store import Namespace
from cachetune_store.printing import shown


@dataclass(frozen=True)
class ReuseConfig:
    """What a request recomputes.

    Attributes:
        selector: name of a registered selector.
        ratio: share of the chunk tokens that is recomputed, in [0, 1].
        skipped: share of the chunk tokens whose rows are not even read, at most `ratio`. These tokens, the first of each chunk's ranking,
            are recomputed in any case, and the selector chooses the others among those that are read. For tiers that are slow
            compared with computing.
        tunable: the request left the ratio to the engine, so numbers tuned for the chunks' tier replace these.
        namespace: what the keys of the request's chunks are made with, and what its calibrated ratio belongs to. It is read once, when
            the request comes, because another process may change it at any moment. None: it is read when the chunks are looked up.
    """

    selector: str = names.DEFAULT
    ratio: float = 0.15
    skipped: float = 0.0
    tunable: bool = field(default=False, compare=False)
    namespace: Namespace | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.skipped <= self.ratio:
            raise ConfigError(
                f"skipped is {shown(self.skipped)}, which is part of the ratio: use a share from 0 to {shown(self.ratio)}."
            )


AUTO = ReuseConfig()
"""What "auto" stands for: the best measured setting (docs/selection.md)."""

PAPER = ReuseConfig(selector=names.OFFLINE, ratio=0.15)
"""As published: frequency ranking, a budget per chunk, r_min 0.15 (alpha 0.5 is the ranking's own). `lead_in="first_token"`
belongs to it: the paper's chunks are captured behind one token."""


def resolve(selector: Any, ratio: Any, auto: ReuseConfig = AUTO) -> ReuseConfig:
    """Check a request's selector and ratio and fill in "auto".

    Raises:
        ConfigError: an unknown selector, or a ratio that is no number in [0, 1] and not "auto".
    """
    if selector == "auto":
        selector = auto.selector
    elif not isinstance(selector, str):
        raise ConfigError(f"selector is {shown(selector)}: use 'auto' or one of {', '.join(selector_names())}.")
    get_selector(selector)
    if isinstance(ratio, str) and ratio == "auto":
        return ReuseConfig(selector, auto.ratio, tunable=True)
    check_share(ratio, "ratio", "'auto' or a number from 0 (recompute nothing) to 1 (everything)")
    return ReuseConfig(selector, float(ratio))
