"""The device's memory for the prompts that a server puts together: one piece, taken once and used again and again.

Buffers that are made for each prompt take more of a GPU than they hold. PyTorch keeps what is freed for the stream on which it was taken, and in
pieces of the size that was asked for: a prompt that is begun on one stream doesn't get what a prompt on another one has freed, and a longer prompt doesn't get
what a shorter one has freed. Here, two prompts have the two ends of one piece, whatever their streams and lengths are: the one that is computed,
and the one that is begun meanwhile. More than two are never there.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from cachetune_rag.errors import CacheTuneError
from cachetune_store.units import format_bytes

ALIGNED = 512
"""Every part begins at a multiple of so many bytes, as memory that torch gives."""
STEPS = 8
"""In so many steps at most, the piece grows to its bound."""
KEPT_FREE = 256 << 20
"""Bytes of the device that stay free when the piece grows: what somebody else allocates in the next moment must not fail for it."""


def aligned(most: int) -> int:
    """What parts may take where their bound is `most` bytes. A prompt that takes no more than this fits."""
    return most // ALIGNED * ALIGNED


class NoRoomError(CacheTuneError):
    """There is no memory for a prompt's keys and values now."""


@dataclass(frozen=True, eq=False)
class Part:
    """One prompt's part of the piece.

    Attributes:
        memory: uint8, not initialised.
        first: whether it is at the beginning of the piece, or at its end.
        taken_on: the stream on which it was taken; None on a CPU.
    """

    memory: Tensor
    first: bool
    taken_on: torch.cuda.Stream | None


class PromptRoom:
    """The memory of two prompts at most. It is used by one thread, and grows when a prompt needs that and no other one has a part of it.

    Args:
        device: the model's.
        most: bytes that it never exceeds; None: no bound.
    """

    def __init__(self, device: torch.device, most: int | None = None):
        self._device, self._most = device, None if most is None else aligned(most)
        self._memory: Tensor | None = None
        self._parts: list[Part] = []
        self._wanted = 0  # bytes with which a prompt could have been begun beside another one
        self._too_much: int | None = None  # bytes that the device had no memory for, when they were wanted so
        # By end of the piece: what the next one waits for, because earlier parts may still be read or written before it.
        self._behind: dict[bool, list[torch.cuda.Event]] = {}

    @property
    def size(self) -> int:
        """Bytes that are taken from the device."""
        return 0 if self._memory is None else self._memory.numel()

    @property
    def parts(self) -> int:
        """How many prompts have a part."""
        return len(self._parts)

    def has_room(self, size: int) -> bool:
        """Whether a prompt of `size` bytes may have a part now, as far as that is known before. If it can't because of another prompt, the piece
        grows for both as soon as none has a part."""
        size = _aligned_up(size)
        return (self._most is None or size <= self._most) and self._is_beside(size)

    def take(self, size: int) -> Part:
        """A part of `size` bytes. It may be used on the current stream, and on streams that wait for it.

        Raises:
            NoRoomError: the prompt needs more than the bound, another prompt has the room, or the device's memory is full.
        """
        size = _aligned_up(size)
        if self._most is not None and size > self._most:
            raise NoRoomError(
                f"its keys and values take {format_bytes(size)}, and prompts may take {format_bytes(self._most)} of the device's memory."
            )
        if not self._is_beside(size):
            raise NoRoomError("there is no room for its keys and values beside the prompts before it.")
        if not self._parts and self.size < max(size, self._wanted):
            self._grow(size)
        assert self._memory is not None
        first = not any(part.first for part in self._parts)
        start = 0 if first else self.size - size
        part = Part(self._memory[start : start + size], first, self._current())
        if part.taken_on is not None:
            for event in chain.from_iterable(self._behind.values()):
                part.taken_on.wait_event(event)
        self._parts.append(part)
        return part

    def give_back(self, part: Part) -> None:
        """A part is not needed any more: no work for it is queued from now on, but for what the stream on which it was taken and the current
        one have been given already."""
        self._parts.remove(part)
        streams = {stream for stream in (part.taken_on, self._current()) if stream is not None}
        self._behind[part.first] = [stream.record_event() for stream in streams]

    def _is_beside(self, size: int) -> bool:
        """Whether a part fits beside those of other prompts."""
        if len(self._parts) == 2:
            return False
        used = sum(part.memory.numel() for part in self._parts)
        if not self._parts or used + size <= self.size:
            return True
        self._note_wanted(used + size)
        return False

    def _note_wanted(self, size: int) -> None:
        """When no prompt has a part, the piece may grow to this size."""
        if (self._most is None or size <= self._most) and (self._too_much is None or size < self._too_much):
            self._wanted = max(self._wanted, size)

    def _grow(self, size: int) -> None:
        """Take the piece anew, of at least `size` bytes, and if there is memory for it, of as many as two prompts wanted lately."""
        for event in chain.from_iterable(self._behind.values()):
            event.synchronize()
        before, self._memory, self._behind = self.size, None, {}
        if before:
            # An error whose traceback is part of a cycle may still have buffers of a prompt, and so the whole piece.
            gc.collect()
        wanted, self._wanted = max(size, self._wanted), 0
        for bytes_ in sorted({self._rounded(wanted), self._rounded(size), max(size, before), size}, reverse=True):
            self._memory = self._taken(bytes_)
            if self._memory is None:
                continue
            if self.size < wanted:
                self._too_much = wanted
            if (stream := self._current()) is not None:
                self._behind = {True: [stream.record_event()]}
            return
        raise NoRoomError(
            f"its keys and values take {format_bytes(size)}, which the device's memory has no room for now."
        )

    def _rounded(self, size: int) -> int:
        """The size that the piece is given for `size` bytes."""
        if self._most is None:
            return size
        step = -(-self._most // STEPS // ALIGNED) * ALIGNED
        return min(self._most, -(-size // step) * step)

    def _taken(self, size: int) -> Tensor | None:
        """Memory of the device; None if it has not as much."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # what torch holds and nobody uses, above all the piece before
            if torch.cuda.mem_get_info(self._device)[0] < size + KEPT_FREE:
                return None
        try:
            with torch.inference_mode(False):  # a tensor that may be written in any mode
                return torch.empty(size, dtype=torch.uint8, device=self._device)
        except torch.OutOfMemoryError:
            return None

    def _current(self) -> torch.cuda.Stream | None:
        return torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None


def _aligned_up(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED
