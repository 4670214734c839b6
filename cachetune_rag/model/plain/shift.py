"""Chunk shift: the average change of a chunk's recomputed tokens is added to its reused tokens.

Chunks are captured without what stands before them in a prompt, and the KV of neighbouring tokens is off in much the same
way. Ours; docs/selection.md has the measurements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cachetune_rag.model.family.rope import Turn

KAPPA = 2.0
"""With this many recomputed tokens, half of their average change is applied; with more tokens, more of it."""


@dataclass(frozen=True)
class ChunkShift:
    """Which rows of a prompt are shifted, and how far.

    In each layer, with dK and dV the fresh minus the stored key (before rotation) and value of a recomputed token, and the
    sums over the recomputed tokens S of one chunk,

        uK = strength * sum of dK / (|S| + kappa),    uV = strength * sum of dV / (|S| + kappa)

    are added to the chunk's reused keys (before rotation) and values, before anything attends to them. A chunk that stands
    in a prompt twice is two chunks.

    Attributes:
        strength: lambda of docs/selection.md, from 0 to 1.
        spans: (start, end) of each chunk, ascending; all of their stored rows must stand in the buffers, those of recomputed
            tokens too.
        known: bool [length], the recomputed tokens whose stored rows do stand there, where not all do: S is of these alone.
        kappa: how many recomputed tokens it takes until half of their average change is applied.
    """

    strength: float
    spans: Sequence[tuple[int, int]]
    known: Tensor | None = None
    kappa: float = KAPPA


class RowShift:
    """A `ChunkShift`, prepared for one forward.

    Args:
        shift: the shift to apply.
        positions: the tokens that are computed, [selected], ascending.
        turns: the rotation of each layer, None where there is none.
    """

    def __init__(self, shift: ChunkShift, positions: Tensor, turns: Sequence[Turn | None]):
        places = positions.cpu()
        known = torch.arange(len(places)) if shift.known is None else shift.known[places].nonzero()[:, 0]
        places = places[known]
        bounds = torch.searchsorted(places, torch.tensor(shift.spans, dtype=torch.int64).view(-1, 2))
        touched = [(*span, *b) for span, b in zip(shift.spans, bounds.tolist(), strict=True) if b[0] < b[1]]
        self._spans = [(start, end) for start, end, _, _ in touched]
        inside = torch.cat([torch.arange(first, last) for _, _, first, last in touched] or [places.new_empty(0)])
        # One row for each chunk: multiplied with all differences, the matrix gives the shift of every chunk.
        weights = torch.zeros(len(touched), len(inside), dtype=torch.float32)
        column = 0
        for row, (_, _, first, last) in enumerate(touched):
            weights[row, column : column + last - first] = shift.strength / (last - first + shift.kappa)
            column += last - first
        self._inside, self._weights = known[inside].to(positions.device), weights.to(positions.device)
        self._places = positions[self._inside]
        self._turns = turns
        self._back: dict[int, tuple[Tensor, Tensor]] = {}

    def apply(self, layer: int, keys: Tensor, values: Tensor, fresh_keys: Tensor, fresh_values: Tensor) -> None:
        """Shift a layer's rows in place, those of the recomputed tokens too: they are overwritten afterwards.

        Args:
            layer: which layer.
            keys, values: the buffers as loaded, [length, kv_heads, dim]; keys are rotated.
            fresh_keys, fresh_values: of the computed tokens, [selected, kv_heads, dim]; keys are rotated.
        """
        if not self._spans:
            return
        turn = self._turns[layer]
        off = self._off(fresh_keys, keys)
        if turn is not None:
            cos, sin = self._rows_back(turn)
            off = cos * off - sin * turn.quarter(off)
        moved = self._moves(off).to(keys.dtype)
        across = moved if turn is None else turn.quarter(moved)
        moved_values = self._moves(self._off(fresh_values, values)).to(values.dtype)
        for number, (start, end) in enumerate(self._spans):
            # Chunk by chunk and in place: the rows stay in cache from one line to the next, and nothing else is written.
            rows = keys[start:end]
            if turn is None:
                rows += moved[number]
            else:
                rows.addcmul_(turn.cos[start:end, None], moved[number])
                rows.addcmul_(turn.sin[start:end, None], across[number])
            values[start:end] += moved_values[number]

    def _off(self, fresh: Tensor, stored: Tensor) -> Tensor:
        """Fresh minus stored, of the chunks' recomputed tokens: float32 [recomputed, kv_heads, dim]."""
        return fresh[self._inside].float() - stored[self._places].float()

    def _moves(self, off: Tensor) -> Tensor:
        """The shift of every chunk, [chunks, kv_heads, dim]."""
        return (self._weights @ off.flatten(1)).unflatten(1, off.shape[1:])

    def _rows_back(self, turn: Turn) -> tuple[Tensor, Tensor]:
        """Tables [recomputed, 1, dim] that undo the rotation, also where it stretches (yarn scales its tables)."""
        if id(turn) not in self._back:
            cos, sin = turn.cos[self._places].float(), turn.sin[self._places].float()
            stretch = cos.square() + sin.square()
            self._back[id(turn)] = (cos / stretch)[:, None], (sin / stretch)[:, None]
        return self._back[id(turn)]
