"""Everything that knows transformers' models: capture, rotary positions, selective forwards, checks of families."""

from cachetune_rag.model.adapter import ModelAdapter
from cachetune_rag.model.plain.buffers import KVBuffers
from cachetune_rag.model.plain.capture import ChunkKV

__all__ = ["ChunkKV", "KVBuffers", "ModelAdapter"]
