"""Chunks in host memory, pinned where a GPU will fetch them."""

from __future__ import annotations

from ..chunk import Chunk, ChunkHead
from ..readers import HostReader
from ..tier_kinds import HOST
from .memory import MemoryTier

__all__ = ["HostTier"]


class HostTier(MemoryTier[Chunk]):
    """Whole chunks in memory, least recently used first out. See MemoryTier."""

    kind = HOST

    def admit(self, chunk: Chunk) -> list[Chunk]:
        """See Tier."""
        with self._lock:
            victims = self._make_room(chunk.host_bytes, chunk.key)
            self._hold(chunk.key, chunk, chunk.host_bytes)
        return victims

    def _reader(self, held: Chunk) -> HostReader:
        return HostReader(held)

    def _head(self, held: Chunk) -> ChunkHead:
        return held.head
