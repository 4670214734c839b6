"""Settings that decide what is recomputed."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cachetune_rag.checking.arguments import check_flag, check_share, is_number
from cachetune_rag.errors import ConfigError
from cachetune_rag.selection import get_selector, names, selector_names
from cachetune_rag.selection.bound import RatioFinder
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
        finder: finds the ratio when the request's tokens are scored, in place of `ratio`, for instance for a bound; None: it is given.
    """

    selector: str = names.DEFAULT
    ratio: float = 0.15
    skipped: float = 0.0
    tunable: bool = field(default=False, compare=False)
    namespace: Namespace | None = field(default=None, compare=False, repr=False)
    finder: RatioFinder | None = field(default=None, repr=False)

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


def check_reuse(*, ratio: Any, selector: Any, max_kl: Any = None, min_top1: Any = None, min_sure: Any = None) -> None:
    """Refuse what no request could be served with, whatever was calibrated.

    Raises:
        ConfigError: says what was given and what is allowed.
    """
    resolve(selector, ratio)
    check_bound(selector, ratio, max_kl, min_top1)
    check_min_sure(min_sure)


_UNSET: Mapping[str, Any] = {"ratio": "auto", "selector": "auto", "max_kl": None, "min_top1": None, "min_sure": None}
"""Arguments of `check_reuse` that nobody has given."""


def check_kept_reuse(fields: Mapping[str, Any], further: Any) -> None:
    """Refuse settings of an object that answers requests with them, as its maker gave them: a framework may make numbers of True or "0.5".

    Args:
        fields: arguments that it was made with, of any name.
        further: the one called generate_kwargs, which may have settings of reuse as well. What is no mapping is left to others.

    Raises:
        ConfigError: no request could be served with them, or one is given twice.
    """
    more = further if isinstance(further, Mapping) else {}
    own = {name: fields[name] for name in _UNSET if name in fields and not _is_unset(name, fields[name])}
    for name in own:
        if name in more:
            raise ConfigError(f"{name} stands in generate_kwargs as well: give it once.")
    check_reuse(**{**_UNSET, **own, **{name: more[name] for name in _UNSET if name in more}})
    if "reuse" in more:
        check_flag(more["reuse"], "reuse")


def _is_unset(name: str, value: Any) -> bool:
    # A saved object names all of its arguments, also those that nobody gave.
    return value is None or (isinstance(value, str) and value == _UNSET[name])


def check_min_sure(min_sure: Any) -> None:
    """Refuse what can't be the least probability of an answer's tokens.

    Raises:
        ConfigError: says what was given and what is allowed.
    """
    if min_sure is not None:
        check_share(min_sure, "min_sure", "a probability from 0 (never read again) to 1, or None for never")


def check_bound(selector: Any, ratio: Any, max_kl: Any, min_top1: Any) -> bool:
    """Whether a request asks for a bound. `selector` and `ratio` are what it asks for beside.

    Raises:
        ConfigError: a bound that is out of range, or that can't be kept with this ratio or selector.
    """
    asked = {name: value for name, value in (("max_kl", max_kl), ("min_top1", min_top1)) if value is not None}
    if not asked:
        return False
    if max_kl is not None and not is_number(max_kl, 0, sys.float_info.max):
        raise ConfigError(f"max_kl is {shown(max_kl)}: use nats, at least 0, or None for any.")
    if min_top1 is not None:
        check_share(min_top1, "min_top1", "a probability from 0 to 1, or None for any")
    what = " and ".join(asked)
    if not (isinstance(ratio, str) and ratio == "auto"):
        raise ConfigError(
            f"ratio is {shown(ratio)}, and {what} finds the ratio itself: leave ratio out, or leave {what} out."
        )
    name = resolve(selector, "auto").selector
    if not get_selector(name).predicts:
        able = [each for each in selector_names() if get_selector(each).predicts]
        raise ConfigError(
            f"selector {shown(name)} says nothing about the request that {what} could be kept by: use 'auto' or one of {', '.join(able)}."
        )
    return True


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
