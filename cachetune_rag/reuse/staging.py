"""The device's memory in which encoded rows lie between being copied there and being put into their places.

A layer's rows are there for as long as it takes to place them, so a ring of two pieces is enough for a prompt: while the rows in one are placed, the next
layer's are copied into the other. It is enough for two prompts as well, the one that is computed and the one that is begun meanwhile: all copies are
queued on one stream, and each waits until the rows that were in its piece before are placed, whichever prompt's they were.
"""

from __future__ import annotations

from weakref import WeakValueDictionary

import torch
from torch import Tensor

STAGES = 2
"""Pieces of the ring: while the rows in one are placed, the next layer's are copied into the other."""
STAGE_STEP = 16 << 20
"""Larger pieces have a multiple of so many bytes, so that prompts of nearly the same length get the memory that PyTorch has kept of others."""

Key = tuple[str, str]
"""A codec's name and a dtype's: rows of one kind are staged together."""


class Piece:
    """Memory of the ring, uint8. Whoever uses it keeps it: it is freed with the last of them."""

    def __init__(self, memory: Tensor):
        self.memory = memory


class Staging:
    """The rings of one model's loaders, one for each kind of rows. Layers take the pieces in turns. It is used by one thread at a time (the model's lock).

    Args:
        device: the model's.
        copy: the stream on which all copies into the pieces are queued.
        place: the stream on which all rows in them are placed.
    """

    def __init__(self, device: torch.device, copy: torch.cuda.Stream, place: torch.cuda.Stream):
        self._device, self._copy, self._place = device, copy, place
        self._pieces = WeakValueDictionary[tuple[int, Key], Piece]()
        # By piece: recorded when the rows that were copied there last are placed. It stays when the piece is made anew.
        self._placed: list[torch.cuda.Event | None] = [None] * STAGES

    @property
    def size(self) -> int:
        """Bytes of the pieces that the next loader may use."""
        return sum(piece.memory.numel() for piece in self._pieces.values())

    def take(self, number: int, key: Key, size: int) -> Piece:
        """A piece of the ring for rows of a kind, of at least `size` bytes: the one that another prompt has, unless that is too small."""
        known = self._pieces.get((number, key))
        if known is not None and known.memory.numel() >= size:
            return known
        if size > STAGE_STEP:
            size = -(-size // STAGE_STEP) * STAGE_STEP
        with (
            torch.cuda.stream(self._copy),
            torch.inference_mode(False),
        ):  # the next prompt's loader writes to it in any mode
            memory = torch.empty(size, dtype=torch.uint8, device=self._device)
        memory.record_stream(self._place)
        made = self._pieces[number, key] = Piece(memory)
        return made

    def is_free(self, layer: int) -> bool:
        """Whether the rows that a layer's would be copied over are placed already."""
        event = self._placed[layer % STAGES]
        return event is None or event.query()

    def await_free(self, layer: int) -> None:
        """Let what is copied from now on wait until the rows that a layer's are copied over are placed."""
        event = self._placed[layer % STAGES]
        if event is not None:
            self._copy.wait_event(event)

    def used(self, layer: int, placed: torch.cuda.Event) -> None:
        """A layer's rows were queued to be copied and placed; `placed` is recorded behind that."""
        self._placed[layer % STAGES] = placed
