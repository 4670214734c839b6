"""Tiered store of the keys and values of document chunks.

    from cachetune_store import ChunkStore, Namespace, make_key

A store keeps encoded rows by chunk key in host memory and in files. It knows bytes, rows, layers and tiers; it knows
nothing of transformers or of any framework.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .chunk import Chunk
    from .claims import Claim
    from .codecs import Codec, codec_names, get_codec, register_codec
    from .errors import (
        BudgetError,
        DamagedChunkError,
        IndexDamagedError,
        NonFiniteError,
        StoreArgumentError,
        StoreClosedError,
        StoreError,
        StoreForkedError,
        StoreFullError,
        StoreLockedError,
        StorePathError,
        StoreReadOnlyError,
        StoreVersionError,
        UnknownCodecError,
        UnknownDocumentError,
        UnknownFormatError,
    )
    from .holders import Holders
    from .keys import FORMAT_VERSION, ChunkKey, Namespace, make_key
    from .layout import ChunkLayout, HeadBytes, LayerSpec, RowFormat
    from .readers import ChunkReader
    from .stats import (
        ChunkGroup,
        DocumentInfo,
        PruneReport,
        StoreStats,
        TenantStats,
        TierStats,
        TierUsage,
        VerifyReport,
    )
    from .store import ChunkStore

# Imported when first used: torch takes seconds, and neither an error nor a byte count needs it.
_HOMES = {
    "chunk": ("Chunk",),
    "claims": ("Claim",),
    "codecs": ("Codec", "codec_names", "get_codec", "register_codec"),
    "errors": (
        "BudgetError",
        "DamagedChunkError",
        "IndexDamagedError",
        "NonFiniteError",
        "StoreArgumentError",
        "StoreClosedError",
        "StoreError",
        "StoreForkedError",
        "StoreFullError",
        "StoreKeyError",
        "StoreLockedError",
        "StorePathError",
        "StoreReadOnlyError",
        "StoreVersionError",
        "UnknownCodecError",
        "UnknownDocumentError",
        "UnknownFormatError",
    ),
    "holders": ("Holders",),
    "keys": ("FORMAT_VERSION", "ChunkKey", "Namespace", "make_key"),
    "layout": ("ChunkLayout", "HeadBytes", "LayerSpec", "RowFormat"),
    "readers": ("ChunkReader",),
    "removals": ("changes_so_far",),
    "stats": (
        "ChunkGroup",
        "DocumentInfo",
        "PruneReport",
        "StoreStats",
        "TenantStats",
        "TierStats",
        "TierUsage",
        "VerifyReport",
    ),
    "store": ("ChunkStore",),
}

__all__ = [
    "FORMAT_VERSION",
    "BudgetError",
    "Chunk",
    "ChunkGroup",
    "ChunkKey",
    "ChunkLayout",
    "ChunkReader",
    "ChunkStore",
    "Claim",
    "Codec",
    "DamagedChunkError",
    "DocumentInfo",
    "HeadBytes",
    "Holders",
    "IndexDamagedError",
    "LayerSpec",
    "Namespace",
    "NonFiniteError",
    "PruneReport",
    "RowFormat",
    "StoreArgumentError",
    "StoreClosedError",
    "StoreError",
    "StoreForkedError",
    "StoreFullError",
    "StoreKeyError",
    "StoreLockedError",
    "StorePathError",
    "StoreReadOnlyError",
    "StoreStats",
    "StoreVersionError",
    "TenantStats",
    "TierStats",
    "TierUsage",
    "UnknownCodecError",
    "UnknownDocumentError",
    "UnknownFormatError",
    "VerifyReport",
    "changes_so_far",
    "codec_names",
    "get_codec",
    "make_key",
    "register_codec",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
