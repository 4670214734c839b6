"""Tiered store of the keys and values of document chunks.

    from cachetune_store import ChunkStore, Namespace, make_key

A store keeps encoded rows by chunk key in host memory and in files. It knows bytes, rows, layers and tiers; it knows
nothing of transformers or of any framework.
"""

from .chunk import Chunk
from .claims import Claim
from .codecs import Codec, codec_names, get_codec, register_codec
from .errors import (
    BudgetError,
    DamagedChunkError,
    IndexDamagedError,
    NonFiniteError,
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
from .keys import FORMAT_VERSION, ChunkKey, Namespace, make_key
from .layout import ChunkLayout, LayerSpec, RowFormat
from .readers import ChunkReader
from .removals import changes_so_far
from .stats import ChunkGroup, DocumentInfo, PruneReport, StoreStats, TenantStats, TierStats, TierUsage, VerifyReport
from .store import ChunkStore

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
    "IndexDamagedError",
    "LayerSpec",
    "Namespace",
    "NonFiniteError",
    "PruneReport",
    "RowFormat",
    "StoreClosedError",
    "StoreError",
    "StoreForkedError",
    "StoreFullError",
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
