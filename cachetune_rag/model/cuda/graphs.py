"""CUDA graphs of selective forwards: their inputs, and how they are captured and replayed in pieces."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cachetune_rag.kernels import row_addresses
from cachetune_rag.model.libraries.private import end_allocation
from cachetune_rag.model.plain.buffers import KVBuffers
from cachetune_rag.model.plain.shift import ChunkShift

MAX_TOKENS = 8192
"""The most tokens for which there are graphs. With more, a layer computes for longer than its launch takes, even while other threads read
from disk, so a graph would save no time and only take memory.
"""
_STEP_TOKENS = 8
"""The token count that a decoding step's single token is padded to. The compiler treats a single token as a special case, and these
few take no more time.
"""
_LENGTHS = (8192, 32768, 131072)
"""Prompt lengths that probes are padded to. They are few, so that prompts of many lengths share graphs."""
_CHUNKS = (128, 1024)
"""Numbers of shifted chunks that forwards are padded to."""
SPAN = 5
"""How many numbers describe a chunk; see `kernels.shift.SPAN`."""


def bucket(tokens: int) -> int:
    """The token count that `tokens` is padded to. Matrix products work in tiles of about this size anyway."""
    step = 64 if tokens <= 1536 else 128 if tokens <= 3072 else 256
    return -(-tokens // step) * step


def buckets(tokens: int) -> list[int]:
    """All sizes to which up to `tokens` tokens are padded and for which there are graphs."""
    return sorted({bucket(n) for n in range(64, min(bucket(tokens), MAX_TOKENS) + 1, 64)})


@dataclass(frozen=True)
class Kind:
    """What a forward's kernel launches depend on. Forwards of one kind share a graph.

    Attributes:
        tokens: computed tokens, padding included.
        probed: how many layers a probe runs through; None for a forward through all layers.
        errors: whether a probe adds up the expected error instead of the attention.
        length: the prompt length that a probe is padded to.
        chunks: the number of shifted chunks that a forward is padded to.
        listed: from this layer on, a probe uses those rows alone that a list names (`Inputs.rows`); None: it uses all.
        whole: whether every layer's rows are there from the start, so that the graph need not be cut into pieces.
    """

    tokens: int
    probed: int | None = None
    errors: bool = False
    length: int = 0
    chunks: int = 0
    listed: int | None = None
    whole: bool = False


STEP = Kind(_STEP_TOKENS, whole=True)
"""A decoding step."""


def shifting_kinds(kind: Kind) -> list[Kind]:
    """The kinds that differ from this one only in that they also shift chunks, those of the fewest chunks first."""
    return [replace(kind, chunks=chunks) for chunks in _CHUNKS]


def padded_length(length: int) -> int:
    """The prompt length that a probe of a prompt of `length` tokens is padded to."""
    return next((padded for padded in _LENGTHS if padded >= length), length)


def padded_chunks(chunks: int) -> int:
    """The number of chunks that `chunks` is padded to; 0 stays 0."""
    return next((padded for padded in _CHUNKS if padded >= chunks), chunks) if chunks else 0


@dataclass(frozen=True)
class ShiftNumbers:
    """The numbers that the kernels of a chunk shift take.

    Attributes:
        known: int64 [computed tokens] on the host; 0 where a token's stored row was not read.
        spans: int64 [chunks, SPAN] on the host, as `kernels.shift` describes them, but with tokens counted without padding.
        rotations: addresses of every layer's cosines and sines.
    """

    known: Tensor
    spans: Tensor
    rotations: Sequence[int]


def shift_numbers(shift: ChunkShift, positions: Tensor, rotations: Sequence[int]) -> ShiftNumbers | None:
    """The numbers of a chunk shift. None where no chunk has a recomputed token (see `model.plain.shift.RowShift`).

    Args:
        shift: the chunk shift.
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
    """The numbers by which forwards of one kind differ. They are parts of one int64 tensor.

    Attributes:
        ids, places: [1, tokens]; padding is token 0 at place 0.
        positions: [tokens]; padding is at -1.
        table: addresses of the prompt's buffers.
        watched, deviations: [1]; see `kernel_call.Probing`.
        roles: [prompt length, with padding]; which rows a probe uses: 0 in all layers, 1 perhaps not in the later ones, 2 never.
        rows: int32, as long; the rows that are used by layers that don't use all of them. Written on the device.
        count: [1]; how many these are, written there too.
        known, rotations, spans: see `kernels.shift`.
        read: an event recorded on the device once it has read the numbers, which is how a forward begins. None on a CPU.
    """

    def __init__(self, kind: Kind, layers: int, device: torch.device):
        self.tokens = kind.tokens
        sizes = [kind.tokens, kind.tokens, kind.tokens, 2 * layers, 1, 1]
        sizes += [kind.tokens, 2 * layers, SPAN * kind.chunks] if kind.chunks else [0, 0, 0]
        listable = 0 if kind.listed is None else kind.length
        sizes += [1, listable]
        cuda = device.type == "cuda"
        self._host = torch.zeros(sum(sizes), dtype=torch.int64, pin_memory=cuda)
        self.read = torch.cuda.Event(enable_timing=True) if cuda else None
        self._numbers = torch.zeros(sum(sizes), dtype=torch.int64, device=device)
        # NumPy, because for so few numbers torch takes far longer.
        self._parts = [part.numpy() for part in self._host.split(sizes)]
        ids, places, self.positions, self.table, self.watched, self.deviations, *rest = self._numbers.split(sizes)
        self.known, self.rotations, spans, self.count, self.roles = rest
        self.rows = torch.zeros(listable, dtype=torch.int32, device=device)
        self.ids, self.places, self.spans = ids[None], places[None], spans.view(-1, SPAN)

    def fill(
        self,
        ids: Tensor,
        positions: Tensor,
        buffers: KVBuffers,
        watched: int = 0,
        deviations: int = 0,
        shift: ShiftNumbers | None = None,
        roles: NDArray[np.int64] | None = None,
    ) -> None:
        """Write a request's numbers. `ids` and `positions` [at most `self.tokens`] should be on the host, which is fastest."""
        self._wait()
        padding = self.tokens - ids.shape[0]
        places = positions.cpu().numpy()
        for part, numbers, filler in zip(self._parts, (ids.cpu().numpy(), places, places), (0, 0, -1), strict=False):
            part[:padding] = filler
            part[padding:] = numbers
        _, _, _, table, watched_at, deviations_at, known, rotations, spans, _, roles_at = self._parts
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
        if roles is not None:
            roles_at[: len(roles)] = roles
            roles_at[len(roles) :] = 0
        self._send()

    def list_rows(self, seen: Tensor, count: int) -> None:
        """The layers that don't use all rows use those where `seen` is true from now on, bool [prompt length] on the device; `count` says how
        many these are.
        """
        length = seen.shape[0]
        places = torch.arange(length, dtype=torch.int32, device=seen.device)
        self.rows[:count] = torch.where(seen, places, length).sort().values[:count]
        self.count.fill_(count)

    def fill_idle(self) -> None:
        """Fill with padding alone, for a forward that uses no prompt's buffers."""
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


Exchange = Callable[[Callable[[Tensor], Tensor], Tensor, Sequence[int]], Tensor]
"""Takes work that has to be done with peers, what it is done on, and the shape of what it gives; gives a tensor that will hold it in a replay."""

_Action = Callable[[Callable[[int], None]], None]
"""What is done before a piece is replayed. It is given `before` of the forward."""


def nothing(_layer: int) -> None:
    """What is called before a layer where nothing is to be done."""


class Graph:
    """A captured forward: its inputs, its pieces in order, and the tensor to which the last piece writes the result.

    Attributes:
        inputs: the numbers that it reads.
        total: what a probe adds up (`kernel_call.Probing`), whose memory is kept as long as the graph; None in other forwards.
    """

    def __init__(self, inputs: Inputs, pieces: list[tuple[_Action, Any]], out: Tensor, total: Tensor | None = None):
        self.inputs, self.total, self._pieces, self._out = inputs, total, pieces, out

    def replay(self, before: Callable[[int], None]) -> Tensor:
        """Run the pieces, and between them call `before(layer)` and do what is done with peers. The result is a copy."""
        for action, piece in self._pieces:
            action(before)
            piece.replay()
        return self._out.clone()


class ExchangeMemory:
    """Memory outside of graphs, for one exchange at a time. All graphs of a model have the same, because only one of them runs at a time."""

    def __init__(self) -> None:
        self._held: dict[torch.dtype, Tensor] = {}

    def has(self, dtype: torch.dtype, count: int) -> bool:
        """Whether it holds so many numbers."""
        return dtype in self._held and self._held[dtype].numel() >= count

    def make(self, like: Tensor, count: int) -> None:
        """Make it hold so many. Graphs keep what they were captured with, so it grows in few steps."""
        had = self._held.get(like.dtype)
        with torch.inference_mode(False):
            self._held[like.dtype] = like.new_empty(max(count, 0 if had is None else 2 * had.numel()))

    def take(self, dtype: torch.dtype, start: int, shape: Sequence[int]) -> Tensor:
        """Memory for a tensor, behind the first `start` numbers."""
        return self._held[dtype][start : start + math.prod(shape)].view(*shape)


class Recorder:
    """Captures a forward as several graphs, the pieces, which share one memory pool and run in order.

    Args:
        pool: the memory pool.
        memory: for exchanges.
    """

    def __init__(self, pool: Any, memory: ExchangeMemory):
        self._pool, self._open, self._memory = pool, False, memory
        self.pieces: list[tuple[_Action, Any]] = []

    def begin(self, action: _Action = lambda _before: None) -> None:
        """Begin a piece, before which `action` is done in a replay."""
        self.pieces.append((action, torch.cuda.CUDAGraph()))
        # Other threads may use the device meanwhile, for example to read chunks into page-locked memory.
        self.pieces[-1][1].capture_begin(pool=self._pool, capture_error_mode="thread_local")
        self._open = True

    def cut(self, layer: int) -> None:
        """End a piece and begin the next, before which `before(layer)` is called."""
        self.end()
        self.begin(lambda before: before(layer))

    def exchange(self, work: Callable[[Tensor], Tensor], given: Tensor, shape: Sequence[int]) -> Tensor:
        """See `Exchange`. The work is not captured, and not done now: so peers need not capture the same at the same time, and do the same work in
        the same order, whichever of them replays a graph."""
        dtype, count = given.dtype, given.numel() + math.prod(shape)
        if not self._memory.has(dtype, count):
            self.end()
            self._memory.make(given, count)
            self.begin()
        sent, received = self._memory.take(dtype, 0, given.shape), self._memory.take(dtype, given.numel(), shape)
        sent.copy_(given)
        self.end()

        def do(_before: Callable[[int], None]) -> None:
            received.copy_(work(sent))

        self.begin(do)
        return received.clone()  # the next exchange writes to the same memory

    def end(self) -> None:
        """End the last piece."""
        if self._open:
            self._open = False
            try:
                self.pieces[-1][1].capture_end()
            except RuntimeError:
                end_allocation(self._pool)
                raise
