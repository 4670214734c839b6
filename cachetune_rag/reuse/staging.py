"""The device's memory in which encoded rows lie between being copied there and being put into their places.

A layer's rows are there for as long as it takes to place them, so a ring of two pieces is enough for a prompt: while the rows in one are placed, the next
layer's are copied into the other. Where layers are small, several are copied and placed together, and the ring has more pieces (`pieces_for`).

One ring is enough for two prompts as well, the one that is computed and the one that is begun meanwhile: all copies are queued on one stream, and each
waits until the rows that were in its piece before are placed, whichever prompt's they were.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from weakref import WeakValueDictionary

import torch
from torch import Tensor

LEAST_PIECES = 2
"""Pieces of the ring: while the rows in one are placed, the next layer's are copied into the other."""
MOST_PIECES = 8
"""Its pieces where layers are small: while the rows in one half are placed, those of the next layers are copied into the other."""
SMALL_RING = 128 << 20
"""Bytes that a ring of more than two pieces may take: as many as the two pieces of a prompt of 16,384 tokens, for a model of Llama-3.1-8B's shape."""
ALIGNED = 512
"""Every piece begins at a multiple of so many bytes, as memory that torch gives."""
STAGE_STEP = 16 << 20
"""Larger pieces have a multiple of so many bytes, so that prompts of nearly the same length get the memory that PyTorch has kept of others. Up to twice
as many bytes, it is a multiple of a quarter of them."""

Key = tuple[str, str]
"""A codec's name and a dtype's: rows of one kind are staged together."""


def piece_size(size: int) -> int:
    """Bytes of the piece that is taken for `size` bytes."""
    if size <= STAGE_STEP:
        return size
    step = STAGE_STEP if size > 2 * STAGE_STEP else STAGE_STEP // 4
    return -(-size // step) * step


def pieces_for(layer_bytes: int) -> int:
    """How many pieces the ring of a prompt has that may be placed several layers at a time, and of which a layer's rows take so many bytes."""
    return max(LEAST_PIECES, min(MOST_PIECES, SMALL_RING // max(1, piece_size(layer_bytes))))


class Piece:
    """Memory of the ring, uint8. Whoever uses it keeps it: it is freed with the last of them."""

    def __init__(self, memory: Tensor):
        self.memory = memory


class Staging:
    """The rings of one model's loaders, one for each kind of rows. A prompt's layers take the pieces in turns. It is used by one thread at a time (the model's lock).

    Args:
        device: the model's.
        copy: the stream on which all copies into the pieces are queued.
        place: the stream on which all rows in them are placed.
    """

    def __init__(self, device: torch.device, copy: torch.cuda.Stream, place: torch.cuda.Stream):
        self._device, self._copy, self._place = device, copy, place
        self._pieces = WeakValueDictionary[tuple[int, Key], Piece]()
        # By piece: recorded when the rows that were copied there last are placed. It stays when the piece is made anew.
        self._placed: list[torch.cuda.Event | None] = [None] * MOST_PIECES

    @property
    def size(self) -> int:
        """Bytes of the pieces that the next loader may use."""
        return sum(piece.memory.numel() for piece in self._pieces.values())

    def take(self, numbers: Sequence[int], key: Key, size: int) -> list[Piece]:
        """Pieces of the ring for rows of a kind, each of at least `size` bytes: those that another prompt has, unless they are too small."""
        known = [self._pieces.get((number, key)) for number in numbers]
        missing = [each is None or each.memory.numel() < size for each in known]
        size = -(-piece_size(size) // ALIGNED) * ALIGNED
        with (
            torch.cuda.stream(self._copy),
            torch.inference_mode(False),
        ):  # the next prompt's loader writes to it in any mode
            # Together, because each allocation takes the host some time.
            memory = torch.empty(sum(missing) * size, dtype=torch.uint8, device=self._device)
        memory.record_stream(self._place)
        made = iter(memory.split(size))
        taken = []
        for number, piece, new in zip(numbers, known, missing, strict=True):
            if new or piece is None:
                piece = self._pieces[number, key] = Piece(next(made))
            taken.append(piece)
        return taken

    def is_free(self, number: int) -> bool:
        """Whether the rows that lay in a piece last are placed already."""
        event = self._placed[number]
        return event is None or event.query()

    def await_free(self, numbers: Iterable[int]) -> None:
        """Let what is copied from now on wait until the rows that lay in some pieces last are placed."""
        events = [event for number in numbers if (event := self._placed[number]) is not None]
        for event in {id(each): each for each in events}.values():  # pieces that were filled together have one
            self._copy.wait_event(event)

    def used(self, numbers: Iterable[int], placed: torch.cuda.Event) -> None:
        """Rows were queued to be copied into some pieces, and to be placed from there; `placed` is recorded behind that."""
        for number in numbers:
            self._placed[number] = placed
