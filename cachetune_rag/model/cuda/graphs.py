"""CUDA graphs of selective forwards: what goes into one, and how it is captured and replayed in pieces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cachetune_rag.kernels import row_addresses
from cachetune_rag.model.libraries.private import end_allocation
from cachetune_rag.model.plain.buffers import KVBuffers
from cachetune_rag.model.plain.shift import ChunkShift

MAX_TOKENS = 8192
"""Above, a layer computes for longer than it takes to launch even while other threads read from disk, and a graph would only hold
memory.
"""
_STEP_TOKENS = 8
"""What a decoding step's one token is padded to: compiled layers take a single token for a case of its own, and these few cost
nothing.
"""
_LENGTHS = (8192, 32768, 131072)
"""Prompt lengths that probes are padded to: few, so that prompts of many lengths share their graphs."""
_CHUNKS = (128, 1024)
"""Numbers of shifted chunks that forwards are padded to."""
SPAN = 5
"""Numbers a chunk takes: see `kernels.shift`."""


def bucket(tokens: int) -> int:
    """The token count that `tokens` is padded to: matrix products work in tiles of about this size anyway."""
    step = 64 if tokens <= 1536 else 128 if tokens <= 3072 else 256
    return -(-tokens // step) * step


def buckets(tokens: int) -> list[int]:
    """Every size that up to `tokens` tokens are padded to, and that has a graph."""
    return sorted({bucket(n) for n in range(64, min(bucket(tokens), MAX_TOKENS) + 1, 64)})


@dataclass(frozen=True)
class Kind:
    """What a forward's kernel launches depend on: forwards of one kind share a graph.

    Attributes:
        tokens: computed tokens, padding included.
        probed: layers that are run to see what the last tokens attend to; None for a forward through all layers.
        errors: whether the expected error is added up rather than the attention.
        length: room for the prompt, where it is probed.
        chunks: room for chunks that are shifted.
        whole: whether every layer's rows are there from the start, so that a graph needs no cuts.
    """

    tokens: int
    probed: int | None = None
    errors: bool = False
    length: int = 0
    chunks: int = 0
    whole: bool = False


STEP = Kind(_STEP_TOKENS, whole=True)
"""A decoding step."""


def length_room(length: int) -> int:
    """Room for a prompt of `length` tokens that is probed."""
    return next((room for room in _LENGTHS if room >= length), length)


def chunk_room(chunks: int) -> int:
    """Room for so many chunks; 0 for none."""
    return next((room for room in _CHUNKS if room >= chunks), chunks) if chunks else 0


@dataclass(frozen=True)
class ShiftNumbers:
    """A chunk shift in numbers.

    Attributes:
        known: int64 [computed tokens] on the host, 0 where a token's stored row isn't there.
        spans: int64 [chunks, SPAN] on the host, as `kernels.shift` wants them, tokens counted without padding.
        rotations: addresses of every layer's cosines and sines.
    """

    known: Tensor
    spans: Tensor
    rotations: Sequence[int]


def shift_numbers(shift: ChunkShift, positions: Tensor, rotations: Sequence[int]) -> ShiftNumbers | None:
    """A shift as the kernels read it; None where no chunk has a recomputed token (see `shift.RowShift`).

    Args:
        shift: what is asked for.
        positions: the tokens that are computed, [selected], ascending.
        rotations: see `ShiftNumbers`.
    """
    places, ends = positions.cpu().numpy(), np.array(shift.spans, np.int64).reshape(-1, 2)
    known = np.ones(len(places), np.int64) if shift.known is None else shift.known.numpy()[places].astype(np.int64)
    bounds = np.searchsorted(places, ends)
    counts = np.diff(np.concatenate(([0], np.cumsum(known)))[bounds], axis=1)
    some = counts[:, 0] > 0
    if not some.any():
        return None
    weights = (shift.strength / (counts[some] + shift.kappa)).astype(np.float32).view(np.int32).astype(np.int64)
    spans = np.concatenate((ends[some], bounds[some], weights), axis=1)
    return ShiftNumbers(torch.from_numpy(known), torch.from_numpy(spans), rotations)


class Inputs:
    """The numbers in which forwards of one kind differ, in one tensor of int64.

    Attributes:
        ids, places: [1, tokens]; padding is token 0 at place 0.
        positions: [tokens]; padding is at -1.
        table: addresses of the prompt's buffers.
        watched, deviations: [1], see `kernel_call.Probing`.
        known, rotations, spans: see `kernels.shift`.
        read: recorded when the device has read the numbers, with which it begins; None on a CPU.
    """

    def __init__(self, kind: Kind, layers: int, device: torch.device):
        self.tokens = kind.tokens
        sizes = [kind.tokens, kind.tokens, kind.tokens, 2 * layers, 1, 1]
        sizes += [kind.tokens, 2 * layers, SPAN * kind.chunks] if kind.chunks else [0, 0, 0]
        cuda = device.type == "cuda"
        self._host = torch.zeros(sum(sizes), dtype=torch.int64, pin_memory=cuda)
        self.read = torch.cuda.Event(enable_timing=True) if cuda else None
        self._numbers = torch.zeros(sum(sizes), dtype=torch.int64, device=device)
        # NumPy: for so few numbers, torch takes the host far longer.
        self._parts = [part.numpy() for part in self._host.split(sizes)]
        ids, places, self.positions, self.table, self.watched, self.deviations, *rest = self._numbers.split(sizes)
        self.known, self.rotations, spans = rest
        self.ids, self.places, self.spans = ids[None], places[None], spans.view(-1, SPAN)

    def fill(
        self,
        ids: Tensor,
        positions: Tensor,
        buffers: KVBuffers,
        watched: int = 0,
        deviations: int = 0,
        shift: ShiftNumbers | None = None,
    ) -> None:
        """Write a request's numbers; `ids` and `positions` [at most `self.tokens`] on the host are cheapest."""
        self._wait()
        padding = self.tokens - ids.shape[0]
        places = positions.cpu().numpy()
        for part, numbers, filler in zip(self._parts, (ids.cpu().numpy(), places, places), (0, 0, -1), strict=False):
            part[:padding] = filler
            part[padding:] = numbers
        _, _, _, table, watched_at, deviations_at, known, rotations, spans = self._parts
        table[:] = row_addresses(buffers.key_rows, buffers.value_rows)
        watched_at[0], deviations_at[0] = watched, deviations
        if spans.shape[0]:
            spans[:] = 0
            if shift is not None:
                known[padding:] = shift.known.numpy()
                rotations[:] = shift.rotations
                rows = spans.reshape(-1, SPAN)[: shift.spans.shape[0]]
                rows[:] = shift.spans.numpy()
                rows[:, 2:4] += padding
        self._send()

    def fill_idle(self) -> None:
        """Padding alone: a forward that touches no buffer."""
        self._wait()
        self._host.zero_()
        self._parts[2][:] = -1
        self._send()

    def _wait(self) -> None:
        if self.read is not None:
            self.read.synchronize()  # the previous numbers have usually been read already

    def _send(self) -> None:
        if self.read is not None:
            from cachetune_rag.kernels.rows import fetch

            fetch(self._host, self._numbers)
            self.read.record()
        else:
            self._numbers.copy_(self._host)


class Graph:
    """A captured forward: its inputs, its pieces in order, and the tensor its last piece leaves the result in."""

    def __init__(self, inputs: Inputs, pieces: list[Any], out: Tensor):
        self.inputs, self._pieces, self._out = inputs, pieces, out

    def replay(self, before: Callable[[int], None]) -> Tensor:
        """Run it; `before(layer)` is called between the pieces. The result is the caller's own."""
        for number, piece in enumerate(self._pieces):
            if number:
                before(number - 1)
            piece.replay()
        return self._out.clone()


class Recorder:
    """Captures a stretch of work as several graphs that share one memory pool and run in order."""

    def __init__(self, pool: Any):
        self._pool, self._open = pool, False
        self.pieces: list[Any] = []

    def begin(self) -> None:
        """Capture from here."""
        self.pieces.append(torch.cuda.CUDAGraph())
        # Other threads may go on using the device, reading chunks into page-locked memory for instance.
        self.pieces[-1].capture_begin(pool=self._pool, capture_error_mode="thread_local")
        self._open = True

    def cut(self) -> None:
        """End a piece and begin the next."""
        self.end()
        self.begin()

    def end(self) -> None:
        """End the last piece."""
        if self._open:
            self._open = False
            try:
                self.pieces[-1].capture_end()
            except RuntimeError:
                end_allocation(self._pool)
                raise
