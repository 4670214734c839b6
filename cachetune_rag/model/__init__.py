"""All that knows transformers: capture, rotary positions, the selective forward, family checks."""

from cachetune_rag.model.adapter import ModelAdapter
from cachetune_rag.model.plain.buffers import KVBuffers
from cachetune_rag.model.plain.capture import ChunkKV

__all__ = ["ChunkKV", "KVBuffers", "ModelAdapter"]
