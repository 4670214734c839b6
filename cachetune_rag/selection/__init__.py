"""Which tokens of reused chunks are recomputed. One file a selector; `registry` names them."""

from cachetune_rag.selection.base import ReusedChunk, SelectionContext, Selector
from cachetune_rag.selection.registry import get_selector, register_selector, selector_names

__all__ = [
    "ReusedChunk",
    "SelectionContext",
    "Selector",
    "get_selector",
    "register_selector",
    "selector_names",
]
