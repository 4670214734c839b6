"""A reused chunk at its place in a prompt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cachetune_rag.selection import ReusedChunk
from cachetune_store import ChunkReader


def deviations_of(reader: ChunkReader) -> Tensor | None:
    """The deviations of an open chunk, read now if they have to be."""
    return reader.deviations


@dataclass
class Source:
    """One reused chunk at one place of the prompt.

    The rows to read of a chunk lie in one piece, in ranking order, so rows of tokens that the prompt doesn't have come along with
    the others. They are written to a place whose rows are overwritten before anything attends to them.

    Attributes:
        reader: the open chunk.
        start: place of the chunk's first token; where the prompt doesn't have that token, the place that it would have.
        rows: how many rows of each layer are needed, counted from the least important; the rest (skipped rows) is
            recomputed and not read.
        inside: numbers of the chunk's tokens that the prompt has; None: all of them.
        spare: place of a token that is computed in every layer and belongs to no source: where the rows of the chunk's other
            tokens go.
    """

    reader: ChunkReader
    start: int
    rows: int
    inside: range | None = None
    spare: int = 0

    @cached_property
    def places(self) -> NDArray[np.int64]:
        """Where every row of the chunk is written to in the prompt, int64 [tokens]."""
        order: NDArray[np.int64] = self.reader.order.numpy()
        if self.inside is None:
            return order + self.start
        return np.where(self._has(order), order + self.start, self.spare)

    @property
    def skipped(self) -> NDArray[np.int64]:
        """Places of the prompt's tokens of which the rows are not read, int64 [tokens]; none for tokens of the chunk that the prompt doesn't have."""
        order: NDArray[np.int64] = self.reader.order.numpy()[self.rows :]
        return (order if self.inside is None else order[self._has(order)]) + self.start

    def as_reused(self, read: Callable[[ChunkReader], Tensor | None] = deviations_of) -> ReusedChunk:
        """The chunk as a selector sees it, with the tokens that the prompt has.

        Args:
            read: gives the deviations of an open chunk, when they are asked for.
        """
        reader, skipped = self.reader, len(self.skipped)
        spread = partial(read, reader) if reader.has_deviations else None
        if self.inside is None:
            return ReusedChunk(self.start, reader.order, reader.scores, spread, skipped)
        first, last = self.inside.start, self.inside.stop

        def inside() -> Tensor | None:
            whole = read(reader)
            return None if whole is None else whole[first:last]

        order: NDArray[np.int64] = reader.order.numpy()
        has = self._has(order)
        return ReusedChunk(
            self.start + first,
            torch.from_numpy(order[has] - first),
            reader.scores[first:last],
            None if spread is None else inside,
            skipped,
        )

    def _has(self, order: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which rows are those of tokens that the prompt has."""
        assert self.inside is not None
        return (order >= self.inside.start) & (order < self.inside.stop)

    def first(self, rows: int) -> Source:
        """The same chunk at the same place, with fewer or more rows."""
        other = Source(self.reader, self.start, rows, self.inside, self.spare)
        other.__dict__["places"] = self.places
        return other
