"""The device's memory for the prompts that a server puts together: one piece, taken once and used again and again.

Buffers that are made for each prompt take more of a GPU than they hold. PyTorch keeps what is freed for the stream on which it was taken, and in
pieces of the size that was asked for: a prompt that is begun on one stream doesn't get what a prompt on another one has freed, and a longer prompt doesn't get
what a shorter one has freed. Here, two prompts share one piece, whatever their streams and lengths are: the one that is computed, and the one that
is begun meanwhile. More than two are never there.

If both fit, they have the two ends of the piece. If not, the one that is begun gets the memory of the one that is computed, layer after layer: a layer's
rows are not needed any more once the layer is computed and its rows are where they are kept. So one prompt's memory is enough for both, and rows are still
copied while the device computes.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from itertools import accumulate

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


class Part:
    """One prompt's part of the piece.

    Args:
        memory: uint8, not initialised.
        start: the byte of the piece at which it begins.
        layers: bytes of each layer of the prompt, in the order in which they lie in it.
        taken_on: the stream on which it was taken; None on a CPU.
        over: the part of the prompt at hand, if this one has memory of it.

    Attributes:
        memory, start, over: see above.
        end: the byte of the piece at which it ends.
    """

    def __init__(
        self,
        memory: Tensor,
        start: int,
        layers: Sequence[int],
        taken_on: torch.cuda.Stream | None,
        over: Part | None,
    ):
        self.memory, self.start, self.end = memory, start, start + memory.numel()
        self.taken_on, self.over = taken_on, over
        self._bounds = [start, *(start + end for end in accumulate(layers))]
        # Of the layers that are done, in their order: the event behind which nothing uses their memory. None on a CPU, where it is so already.
        self._done: list[torch.cuda.Event | None] = []

    @property
    def done(self) -> bool:
        """Whether all work on all layers is queued, so that the next prompt may get the memory of one after another."""
        return len(self._bounds) - 1 == len(self._done) > 0

    def layer_done(self, stream: torch.cuda.Stream | None) -> None:
        """Nothing needs the memory of the next layer any more, but for what was queued on `stream`."""
        self._done.append(None if stream is None else stream.record_event())

    def await_layer(self, layer: int, stream: torch.cuda.Stream | None) -> None:
        """Let `stream` wait until nothing of the prompt before uses this part's memory of a layer."""
        if self.over is None or stream is None:
            return
        event = self.over.last_in(self._bounds[layer], self._bounds[layer + 1])
        if event is not None:
            stream.wait_event(event)

    def last_in(self, start: int, end: int) -> torch.cuda.Event | None:
        """The event of the last layer that has any of the bytes [start, end) of the piece: those of the layers before it come before it."""
        for layer in reversed(range(len(self._done))):
            if self._bounds[layer] < end:
                return self._done[layer] if self._bounds[layer + 1] > start else None
        return None


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
        # What the next part waits for, because earlier ones may still be read or written before it; by the stream on which that happens.
        self._behind: dict[torch.cuda.Stream, torch.cuda.Event] = {}

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
        return (self._most is None or size <= self._most) and self._start_for(size) is not None

    def take(self, size: int, layers: Sequence[int] = ()) -> Part:
        """A part of `size` bytes. It may be used on the current stream, and on streams that wait for it, each layer's memory behind `await_layer`.

        Args:
            size: bytes.
            layers: bytes of each of the prompt's layers, in the order in which they lie there. Without them, no other prompt gets this memory
                before it is given back.

        Raises:
            NoRoomError: the prompt needs more than the bound, another prompt has the room, or the device's memory is full.
        """
        size = _aligned_up(size)
        if self._most is not None and size > self._most:
            raise NoRoomError(
                f"its keys and values take {format_bytes(size)}, and prompts may take {format_bytes(self._most)} of the device's memory."
            )
        start = self._start_for(size)
        if start is None:
            raise NoRoomError("there is no room for its keys and values beside the prompts before it.")
        if not self._parts and self.size < max(size, self._wanted):
            self._grow(size)
        assert self._memory is not None
        end = start + size
        over = next((part for part in self._parts if part.start < end and start < part.end), None)
        part = Part(self._memory[start:end], start, layers, self._current(), over)
        if part.taken_on is not None:
            for event in self._behind.values():
                part.taken_on.wait_event(event)
        self._parts.append(part)
        return part

    def layer_done(self, part: Part) -> None:
        """Nothing needs a part's next layer any more, but for what the current stream has been given already."""
        part.layer_done(self._current())

    def await_layer(self, part: Part, layer: int) -> None:
        """Let the current stream wait until nothing of the prompt before uses a part's memory of a layer."""
        part.await_layer(layer, self._current())

    def give_back(self, part: Part) -> None:
        """A part is not needed any more: no work for it is queued from now on, but for what the stream on which it was taken and the current
        one have been given already."""
        self._parts.remove(part)
        part.over = None
        for stream in {part.taken_on, self._current()}:
            if stream is not None:
                self._behind[stream] = stream.record_event()

    def _start_for(self, size: int) -> int | None:
        """Where a part would begin; None if it can't have one beside those of other prompts. Without any, the piece may have to grow first."""
        if not self._parts:
            return 0
        if len(self._parts) == 2:
            return None
        (other,) = self._parts
        if size <= other.start:
            return 0
        if other.end + size <= self.size:
            return self.size - size
        if self._note_wanted(other.memory.numel() + size):
            return None  # it waits this once, so that the piece has room for two from then on
        # At the same byte, so that its first layers get the memory of the other's first layers, which are done first.
        return min(other.start, self.size - size) if other.done and size <= self.size else None

    def _note_wanted(self, size: int) -> bool:
        """When no prompt has a part, the piece may grow to this size. Returns whether it will be tried."""
        if (self._most is not None and size > self._most) or (self._too_much is not None and size >= self._too_much):
            return False
        self._wanted = max(self._wanted, size)
        return self._wanted > self.size

    def _grow(self, size: int) -> None:
        """Take the piece anew, of at least `size` bytes, and if there is memory for it, of as many as two prompts wanted lately."""
        for event in self._behind.values():
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
                self._behind = {stream: stream.record_event()}
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
