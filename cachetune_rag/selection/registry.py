"""Selectors by name."""

from __future__ import annotations

from cachetune_rag.errors import ConfigError
from cachetune_rag.selection.base import Selector
from cachetune_rag.selection.chunk_head import ChunkHeadSelector
from cachetune_rag.selection.constant import AllSelector, NoneSelector
from cachetune_rag.selection.expected_error import (
    EarlyExpectedErrorSelector,
    ExpectedErrorSelector,
    TokenExpectedErrorSelector,
)
from cachetune_rag.selection.frequency import FrequencySelector
from cachetune_rag.selection.kv_deviation import KVDeviationSelector
from cachetune_rag.selection.layer0_value import Layer0ValueSelector
from cachetune_rag.selection.probe import ProbeSelector
from cachetune_rag.selection.random import RandomSelector
from cachetune_store.printing import shown

_SELECTORS: dict[str, Selector] = {}


def register_selector(selector: Selector) -> None:
    """Make a selector available by its name; a name that is taken is refused."""
    if selector.name in _SELECTORS or selector.name == "auto":
        raise ConfigError(
            f"selector name {shown(selector.name)} is taken; give it another name (taken: {', '.join(selector_names())})."
        )
    _SELECTORS[selector.name] = selector


def selector_names() -> list[str]:
    """Names of the registered selectors."""
    return sorted(_SELECTORS)


def get_selector(name: str) -> Selector:
    """The selector registered as `name`."""
    try:
        return _SELECTORS[name]
    except (KeyError, TypeError):
        raise ConfigError(
            f"unknown selector {shown(name)}: use 'auto' or one of {', '.join(selector_names())}."
        ) from None


for _selector in (
    FrequencySelector(),
    ProbeSelector(),
    ExpectedErrorSelector(),
    EarlyExpectedErrorSelector(),
    TokenExpectedErrorSelector(),
    ChunkHeadSelector(),
    KVDeviationSelector(),
    Layer0ValueSelector(),
    RandomSelector(),
    NoneSelector(),
    AllSelector(),
):
    register_selector(_selector)
