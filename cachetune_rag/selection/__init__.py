"""Which tokens of reused chunks are recomputed. One file a selector; `registry` names them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cachetune_rag.selection.base import ReusedChunk, SelectionContext, Selector
    from cachetune_rag.selection.registry import get_selector, register_selector, selector_names

# Imported when first used: selectors need torch, which takes seconds, and the selectors' names don't.
_HOMES = {
    "base": ("ReusedChunk", "SelectionContext", "Selector"),
    "registry": ("get_selector", "register_selector", "selector_names"),
}

__all__ = [
    "ReusedChunk",
    "SelectionContext",
    "Selector",
    "get_selector",
    "register_selector",
    "selector_names",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
