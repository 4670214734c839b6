"""vLLM's pages as the memory that a prompt is put together in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from cachetune_rag.model import KVBuffers
from cachetune_rag.reuse.memory import Ids, KVMemory
from cachetune_rag.reuse.prefix_cache import KeptRows


class Pages:
    """The key and value pages of all layers of one worker.

    Args:
        layers: vLLM's attention layers, in the model's order.
        block_size: tokens in a page.
    """

    def __init__(self, layers: Sequence[nn.Module], block_size: int):
        self._layers, self.block_size = list(layers), block_size

    def slots(self, blocks: Sequence[int], start: int, end: int) -> Tensor:
        """Where tokens [start, end) of a request with these pages stand; int64 [end - start]."""
        places = torch.arange(start, end)
        return torch.tensor(blocks)[places // self.block_size] * self.block_size + places % self.block_size

    def write(self, layer: int, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        """Write rows, [tokens, kv_heads, head_dim], to slots, by the method that the attention layer writes its own rows with: this
        method knows the pages' layout and number format."""
        attention: Any = self._layers[layer]
        cache = attention.kv_cache
        if isinstance(cache, list | tuple):  # one for each virtual engine, of which there is one
            cache = cache[0]
        attention.impl.do_kv_cache_update(attention, keys, values, cache, slots)


class PagedMemory:
    """A prompt's rows, put together in buffers of the engine's and written to vLLM's pages as soon as a layer is final.

    Args:
        inner: gives the buffers, and keeps the beginnings of prompts.
        pages: where finished layers go.
        blocks: the request's pages.
        start, end: the rows that are written.
    """

    def __init__(self, inner: KVMemory, pages: Pages, blocks: Sequence[int], start: int, end: int):
        self._inner, self._pages, self._blocks, self._start, self._end = inner, pages, blocks, start, end
        self._slots: Tensor | None = None

    def take(self, ids: Ids, exact: int, room: int) -> tuple[KVBuffers, int]:
        """See `KVMemory`."""
        buffers, kept = self._inner.take(ids, exact, room)
        self._slots = self._pages.slots(self._blocks, self._start, self._end).to(buffers.device)
        return buffers, kept

    def layer_ready(self, buffers: KVBuffers, layer: int) -> None:
        """See `KVMemory`."""
        assert self._slots is not None  # `take` was called
        keys, values = (rows[layer][self._start : self._end] for rows in (buffers.key_rows, buffers.value_rows))
        self._pages.write(layer, keys, values, self._slots)

    def keep(self, ids: Ids, exact: int, buffers: KVBuffers | None, cache: Cache) -> None:
        """See `KVMemory`."""
        self._inner.keep(ids, exact, buffers, cache)

    def beginning(self, ids: Ids) -> KeptRows | None:
        """See `KVMemory`."""
        return self._inner.beginning(ids)

    def forget(self) -> None:
        """See `KVMemory`."""
        self._inner.forget()
