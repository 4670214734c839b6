"""What is known of a prompt's chunks before any is opened, so that a prompt whose disk is too slow is left without waiting for the disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cachetune_rag.reuse.config import ReuseConfig
from cachetune_rag.text.prompts.segments import Span
from cachetune_store import ChunkKey
from cachetune_store.chunk import ChunkHead


@dataclass(frozen=True)
class Foreseen:
    """A prompt's chunks, of all of which it is known where they are.

    Attributes:
        spans: their places in the prompt, in order.
        keys: of all of them, each once, in the prompt's order.
        config: the settings, tuned for where the chunks are if they were left to the engine.
        waiting: the heads of those that would have to be read, in the prompt's order.
        seconds: the least time in which the rows that are needed of these are likely to be read.
    """

    spans: tuple[Span, ...]
    keys: tuple[ChunkKey, ...]
    config: ReuseConfig
    waiting: Mapping[ChunkKey, ChunkHead]
    seconds: float

    @property
    def tokens(self) -> int:
        """Tokens of the prompt that belong to the chunks."""
        return sum(span.end - span.start for span in self.spans)
