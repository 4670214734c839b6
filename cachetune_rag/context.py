"""What a selector may look at of one request (`SelectionContext`), backed by the model and the store."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from cachetune_rag.model import KVBuffers, ModelAdapter
from cachetune_rag.pipeline.loader import LayerLoader, Source
from cachetune_rag.prompt import Prompt
from cachetune_rag.selection import ReusedChunk


class RequestContext:
    """See `SelectionContext`.

    Args:
        adapter: the model.
        prompt: the prompt.
        sources: the reused chunks, with the rows of each that are read.
        computed: bool [length], the tokens that are computed whatever is selected.
        buffers, loader: where the KV is put together, and what brings it.

    Attributes:
        probed: token-layers that the selector had run so far.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        prompt: Prompt,
        sources: Sequence[Source],
        computed: Tensor,
        buffers: KVBuffers,
        loader: LayerLoader,
    ):
        self.chunks = [_chunk(source) for source in sources]
        self.length, self.num_layers = len(prompt.ids), adapter.num_layers
        self.probed = 0
        self._adapter, self._prompt, self._computed = adapter, prompt, computed
        self._buffers, self._loader = buffers, loader

    @property
    def seed(self) -> int:
        """A number that depends on the prompt's token ids alone."""
        return int.from_bytes(hashlib.sha256(repr(self._prompt.ids).encode()).digest()[:7])

    def observe_attention(self, num_layers: int, queries: int, observe: Callable[[int, Tensor], None]) -> None:
        """See `SelectionContext`."""
        ids, places = self._probe(num_layers)
        device = self._adapter.device
        self._adapter.observe_attention(
            ids.to(device), places.to(device), self._buffers, num_layers, queries, self._loader.load, observe
        )

    def received_attention(self, num_layers: int, queries: int) -> Tensor:
        """See `SelectionContext`."""
        ids, places = self._probe(num_layers)
        return self._adapter.received_attention(ids, places, self._buffers, num_layers, queries, self._loader.load)

    def expected_error(self, num_layers: int, queries: int) -> Tensor:
        """See `SelectionContext`."""
        end = max(chunk.start + chunk.tokens for chunk in self.chunks)
        # Where the prompt ends in a chunk, its last token is computed all the same.
        queries = min(queries, max(1, self.length - end))
        self._loader.begin()  # rows are on their way while deviations are put together
        deviations = self._deviations(num_layers)
        if deviations is None:
            return self.received_attention(num_layers, queries)
        ids, places = self._probe(num_layers)
        return self._adapter.expected_error(
            ids, places, self._buffers, self._loader.bring(deviations), num_layers, queries, self._loader.load
        )

    def reused_states(self, layer: int) -> tuple[Tensor, Tensor]:
        """See `SelectionContext`."""
        self._loader.load(layer)
        return self._buffers.key_rows[layer], self._buffers.value_rows[layer]

    def fresh_states(self, layer: int) -> tuple[Tensor, Tensor]:
        """See `SelectionContext`."""
        self.probed += round(self.length * self._adapter.fresh_layers(layer))
        return self._adapter.fresh_states(ids_of(self._prompt), layer)

    def _probe(self, num_layers: int) -> tuple[Tensor, Tensor]:
        """Ids and places of what a probe computes; counted."""
        ids, places = some_of(self._prompt, self._computed)
        self.probed += len(ids) * num_layers
        return ids, places

    def _deviations(self, num_layers: int) -> Tensor | None:
        """Deviations of every token of the prompt in the first layers, [length, columns], 0 outside of reused chunks; None if none
        are known.
        """
        columns = 2 * sum(spec.heads for spec in self._adapter.layers[:num_layers])
        known = [chunk.deviations[:, :columns] for chunk in self.chunks if chunk.deviations is not None]
        if not known:
            return None
        on_gpu = self._adapter.device.type == "cuda"
        table = torch.empty(self.length, known[0].shape[1], dtype=known[0].dtype, pin_memory=on_gpu)
        usual: Tensor | None = None
        at, rows = 0, table.numpy()  # NumPy copies without waking threads
        for chunk in sorted(self.chunks, key=lambda c: c.start):
            rows[at : chunk.start] = 0
            at = chunk.start + chunk.tokens
            if chunk.deviations is not None:
                rows[chunk.start : at] = chunk.deviations.numpy()[:, :columns]
            else:
                usual = torch.cat(known).float().mean(0) if usual is None else usual
                rows[chunk.start : at] = usual.numpy()
        rows[at:] = 0
        return table


def _chunk(source: Source) -> ReusedChunk:
    reader = source.reader
    return ReusedChunk(source.start, reader.order, reader.scores, reader.deviations, reader.layout.tokens - source.rows)


# On the host, NumPy: it reads a long tuple faster than torch, and wakes no threads for a few thousand numbers.


def ids_of(prompt: Prompt) -> Tensor:
    """The prompt's token ids on the host, int64 [length]."""
    return torch.from_numpy(np.array(prompt.ids, dtype=np.int64))


def some_of(prompt: Prompt, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and places of the tokens where `wanted` is true, on the host."""
    places = wanted.numpy().nonzero()[0]
    # Not all of a long tuple becomes an array: each number in it costs a trip to memory.
    ids = np.array([prompt.ids[place] for place in places.tolist()], dtype=np.int64)
    return torch.from_numpy(ids), torch.from_numpy(places)
