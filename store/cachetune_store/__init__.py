"""Tiered store of the keys and values of document chunks.

    from cachetune_store import ChunkStore, Namespace, make_key

A store keeps encoded rows by chunk key in host memory and in files. It knows bytes, rows, layers and tiers; it knows
nothing of transformers or of any framework.
"""

from .chunk import Chunk
from .codecs import Codec, codec_names, get_codec, register_codec
from .errors import (
    BudgetError,
    DamagedChunkError,
    IndexDamagedError,
    NonFiniteError,
    StoreClosedError,
    StoreError,
    StoreFullError,
    StorePathError,
    StoreVersionError,
    UnknownCodecError,
    UnknownDocumentError,
)
from .keys import FORMAT_VERSION, ChunkKey, Namespace, make_key
from .layout import ChunkLayout, LayerSpec
from .readers import ChunkReader
from .stats import DocumentInfo, StoreStats, TierStats, VerifyReport
from .store import ChunkStore

__all__ = [
    "FORMAT_VERSION",
    "BudgetError",
    "Chunk",
    "ChunkKey",
    "ChunkLayout",
    "ChunkReader",
    "ChunkStore",
    "Codec",
    "DamagedChunkError",
    "DocumentInfo",
    "IndexDamagedError",
    "LayerSpec",
    "Namespace",
    "NonFiniteError",
    "StoreClosedError",
    "StoreError",
    "StoreFullError",
    "StorePathError",
    "StoreStats",
    "StoreVersionError",
    "TierStats",
    "UnknownCodecError",
    "UnknownDocumentError",
    "VerifyReport",
    "codec_names",
    "get_codec",
    "make_key",
    "register_codec",
]
