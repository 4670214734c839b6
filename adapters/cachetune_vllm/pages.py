"""vLLM's pages as the memory that a prompt is put together in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from cachetune_rag.model import KVBuffers
from cachetune_rag.reuse.memory import EngineMemory, Ids
from cachetune_rag.reuse.prefix_cache import KeptRows
from cachetune_rag.reuse.prompt_room import Part, PromptRoom
from cachetune_vllm.messages import Load

View = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""Keys and values in a layer's pages, each [pages, tokens in a page, kv_heads, head_dim], given the pages and the keys' head_dim."""

FEW_PAGES = 2
"""Up to so many pages are copied one by one: on a GPU, that takes fewer launches in each layer than to gather their rows."""
LEAST_READ = 64
"""On a GPU, a beginning of fewer tokens is computed again: to read it, the host queues several small kernels for each layer before anything else of the prompt
can begin, while to compute it adds a few tokens to the hundreds that are computed anyway."""


class Pages:
    """The key and value pages of all layers of one worker.

    Args:
        layers: vLLM's attention layers, in the model's order.
        block_size: tokens in a page.
        count: how many pages each of them has.
        least_read: fewer tokens are not worth reading.

    Attributes:
        readable: whether `read` may be called.
    """

    def __init__(self, layers: Sequence[nn.Module], block_size: int, count: int, least_read: int = 1):
        self._layers, self.block_size, self._count, self._least_read = list(layers), block_size, count, least_read
        self.readable = False
        self._views: list[View] = []

    def slots(self, blocks: Sequence[int], start: int, end: int, device: torch.device) -> Tensor:
        """Where tokens [start, end) of a request with these pages stand; int64 [end - start], on `device`, in the order of its current
        stream.

        Raises:
            RuntimeError: they stand nowhere. vLLM's kernels don't look: they would write to memory that isn't theirs.
        """
        # NumPy: waking torch's threads takes longer than the work.
        first, size = start // self.block_size, self.block_size
        pages = np.array(blocks[first : -(-end // size)], np.int64)
        if len(pages) < -(-end // size) - first or (len(pages) and not 0 <= pages.min() <= pages.max() < self._count):
            raise RuntimeError(
                f"tokens {start} to {end} are to be put into the pages {list(blocks)} of {size} tokens, and vLLM's cache has pages 0 to "
                f"{self._count - 1}: nothing is written. Please open an issue with this message."
            )
        every = (pages[:, None] * size + np.arange(size)).ravel()
        slots = torch.from_numpy(every[start - first * size : end - first * size])
        # From page-locked memory: the host need not wait for the copy.
        return slots.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else slots

    def write(self, layer: int, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        """Write rows, [tokens, kv_heads, head_dim], to slots, by the method that the attention layer writes its own rows with: this
        method knows the pages' layout and number format.

        Raises:
            RuntimeError: there are not as many slots as rows.
        """
        if keys.shape[0] != slots.shape[0]:
            raise RuntimeError(
                f"layer {layer} has {keys.shape[0]} rows for {slots.shape[0]} slots: nothing is written. Please open an issue with this message."
            )
        attention: Any = self._layers[layer]
        attention.impl.do_kv_cache_update(attention, keys, values, self._pages_of(layer), slots)

    def worth_reading(self, count: int) -> bool:
        """Whether so many tokens can be read, and sooner than they are computed."""
        return self.readable and count >= self._least_read

    def read(self, blocks: Sequence[int], start: int, end: int, buffers: KVBuffers) -> None:
        """Copy the rows of tokens [start, end) of a request with these pages to their places in `buffers`, in all layers."""
        size, device = self.block_size, buffers.device
        numbers = range(start // size, -(-end // size))
        pages = offsets = None
        if len(numbers) > FEW_PAGES:
            slots = self.slots(blocks, start, end, device)
            pages, offsets = slots // size, slots % size
        for layer, rows in enumerate(zip(buffers.key_rows, buffers.value_rows, strict=True)):
            buffers.await_layer(layer)
            there = self._views[layer](self._pages_of(layer), rows[0].shape[-1])
            for mine, stored in zip(rows, there, strict=True):
                if pages is not None:
                    mine[start:end].copy_(stored[pages, offsets])
                    continue
                for number in numbers:
                    first, last = max(start, number * size), min(end, (number + 1) * size)
                    mine[first:last].copy_(stored[blocks[number], first - number * size : last - number * size])

    def learn_to_read(self, like: KVBuffers) -> bool:
        """Find out how rows lie in the pages, and whether they can be read: write some to page 0, which vLLM gives to no request, and look
        where they are.

        How rows lie there differs between attention kernels and releases of vLLM. Pages that hold other numbers than were written
        (8-bit ones, say) can't be read.

        Args:
            like: buffers of the model, of as many rows as a page has tokens at most.
        """
        slots = torch.arange(like.length, device=like.device)
        views = []
        for layer in range(len(self._layers)):
            keys, values = (_numbers(rows[layer]) for rows in (like.key_rows, like.value_rows))
            self.write(layer, keys, values, slots)
            fitting = [view for view in _VIEWS if _holds(view, self._pages_of(layer), keys, values)]
            if len(fitting) != 1:
                return False
            views += fitting
        self._views = views
        return True

    def _pages_of(self, layer: int) -> Tensor:
        attention: Any = self._layers[layer]
        pages: Tensor | Sequence[Tensor] = attention.kv_cache
        # One for each virtual engine, of which there is one.
        return pages if isinstance(pages, Tensor) else pages[0]


class PagedMemory:
    """A prompt's rows, put together in buffers of the engine's and written to vLLM's pages as soon as a layer is final.

    Args:
        inner: makes the buffers, and keeps the beginnings of prompts that vLLM's pages don't have.
        pages: where finished layers go.
        load: the request's pages, and which rows are written there.
        room: the memory of the buffers.
        free: the point on vLLM's stream behind which these pages may be read and written; None on a CPU.
    """

    def __init__(
        self, inner: EngineMemory, pages: Pages, load: Load, room: PromptRoom, free: torch.cuda.Event | None = None
    ):
        self._inner, self._pages, self._load, self._free = inner, pages, load, free
        self._room = room
        self._part: Part | None = None
        self._slots: Tensor | None = None

    def has_room(self, ids: Ids) -> bool:
        """Whether there is memory for the buffers of a prompt without an answer, as far as that is known before `take`."""
        return self._room.has_room(self._inner.bytes_for(ids, 0))

    def take(self, ids: Ids, exact: int, answer_tokens: int) -> tuple[KVBuffers, int]:
        """See `KVMemory`.

        Raises:
            NoRoomError: there is no memory for the buffers.
        """
        load = self._load
        self.close()  # if the prompt starts over, what it had before is not used any more
        inner = self._inner
        self._part = part = self._room.take(inner.bytes_for(ids, answer_tokens), inner.layer_bytes(ids, answer_tokens))
        buffers, kept = inner.take(ids, exact, answer_tokens, part.memory, partial(self._room.await_layer, part))
        self._slots = self._pages.slots(load.blocks, load.start, load.end, buffers.device)
        there = min(load.exact, exact)
        if not self._pages.worth_reading(there - kept):
            return buffers, kept
        if self._free is not None:
            torch.cuda.current_stream(buffers.device).wait_event(self._free)
        self._pages.read(load.blocks, kept, there, buffers)
        return buffers, there

    def close(self) -> None:
        """The buffers are not used any more. They may be closed twice."""
        part, self._part = self._part, None
        if part is not None:
            self._room.give_back(part)

    def layer_ready(self, buffers: KVBuffers, layer: int) -> None:
        """See `KVMemory`."""
        load = self._load
        assert self._slots is not None  # `take` was called
        keys, values = (rows[layer][load.start : load.end] for rows in (buffers.key_rows, buffers.value_rows))
        self._pages.write(layer, keys, values, self._slots)
        if self._pages.readable:  # else, `keep` needs the buffers once more
            assert self._part is not None
            self._room.layer_done(self._part)

    def keep(self, ids: Ids, exact: int, buffers: KVBuffers | None, cache: Cache) -> None:
        """See `KVMemory`. Where vLLM's pages can be read, its prefix cache keeps the beginning, and no memory is spent on a copy."""
        if not self._pages.readable:
            self._inner.keep(ids, exact, buffers, cache)

    def beginning(self, ids: Ids) -> KeptRows | None:
        """See `KVMemory`."""
        return self._inner.beginning(ids)

    def forget(self) -> None:
        """See `KVMemory`."""
        self._inner.forget()


def _side_by_side(pages: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """[pages, kv_heads, tokens, 2 * head_dim]: a token's values follow its keys (vLLM's kernels for GPUs)."""
    by_token = pages.transpose(1, 2)
    return by_token[..., :head_dim], by_token[..., head_dim:]


def _halves(pages: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """The same shape, but a page's values follow all of its keys (vLLM's kernels for CPUs)."""
    count, heads, tokens, _ = pages.shape
    keys, values = pages.view(count, heads, 2, tokens, head_dim).unbind(2)
    return keys.transpose(1, 2), values.transpose(1, 2)


def _halves_by_channel(pages: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """As `_halves`, with a page's keys channel by channel."""
    count, heads, tokens, _ = pages.shape
    halves = pages.view(count, heads, 2, tokens * head_dim)
    keys = halves[:, :, 0].view(count, heads, head_dim, tokens)
    return keys.permute(0, 3, 1, 2), halves[:, :, 1].view(count, heads, tokens, head_dim).transpose(1, 2)


_VIEWS: tuple[View, ...] = (_side_by_side, _halves, _halves_by_channel)


def _numbers(like: Tensor) -> Tensor:
    """Numbers of the shape and type of `like`, different enough that no other layout shows the same."""
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(like.numel())).to(like)


def _holds(view: View, pages: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether the rows that were written to page 0 are found there by `view`."""
    try:
        shown = view(pages[:1], keys.shape[-1])
    except RuntimeError:  # the pages have no such shape
        return False
    wanted = (keys, values)
    return all(
        there.dtype == rows.dtype
        and there[0, : len(rows)].shape == rows.shape
        and torch.equal(there[0, : len(rows)], rows)
        for there, rows in zip(shown, wanted, strict=True)
    )
