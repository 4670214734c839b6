"""What a selector sees of one prompt (`SelectionContext`): the model and the stored rows."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from cachetune_rag.model import KVBuffers, ModelAdapter
from cachetune_rag.model.plain.probe import ProbePass
from cachetune_rag.model.plain.shortlist import Shortlist
from cachetune_rag.reuse.layer_loader import LayerLoader
from cachetune_rag.reuse.source import Source
from cachetune_rag.selection.base import all_places
from cachetune_rag.text.prompts.continuations import Continuation
from cachetune_rag.text.prompts.prompt import Prompt


class PromptView:
    """See `SelectionContext`.

    Args:
        adapter: the model.
        prompt: the prompt.
        sources: the reused chunks, with the rows of each that are read.
        computed: bool [length], the tokens that are computed whatever the selector chooses.
        buffers: where the keys and values are put together.
        loader: brings the stored rows there.
        continuations: see `SelectionContext`.

    Attributes:
        probed: token-layers that the selector has had computed so far.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        prompt: Prompt,
        sources: Sequence[Source],
        computed: Tensor,
        buffers: KVBuffers,
        loader: LayerLoader,
        continuations: Sequence[Continuation] = (),
    ):
        self.continuations = continuations
        self.chunks = [source.as_reused() for source in sources]
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
        self._adapter.observe_attention(self._probe(num_layers, queries), observe)

    def received_attention(self, num_layers: int, queries: int) -> Tensor:
        """See `SelectionContext`."""
        return self._adapter.received_attention(self._probe(num_layers, queries))

    def expected_error(self, num_layers: int, queries: int, shortlist: tuple[int, int] | None = None) -> Tensor:
        """See `SelectionContext`."""
        end = max(chunk.start + chunk.tokens for chunk in self.chunks)
        # A prompt that ends in a chunk has its last token computed anyway.
        queries = min(queries, max(1, self.length - end))
        pieces = self._deviations()
        if not pieces:
            self._loader.start()
            return self.received_attention(num_layers, queries)
        probe = self._probe(num_layers, queries)
        if shortlist is not None:
            probe = self._narrowed(probe, *shortlist)
        self._loader.start()
        total = self._adapter.expected_error(probe, self._loader.copy_deviations(pieces, num_layers))
        return total / min(queries, len(probe.ids))

    def next_token(self, num_layers: int) -> Tensor:
        """See `SelectionContext`."""
        ids, places = some_of(self._prompt, self._computed)
        if num_layers == self.num_layers:
            ids, places = ids[-1:], places[-1:]  # the probe has left the rows of the others in all layers
        self.probed += len(ids) * self.num_layers
        return self._adapter.selective_forward(ids, places, self._buffers, self._loader.load)[0]

    def reused_states(self, layer: int) -> tuple[Tensor, Tensor]:
        """See `SelectionContext`."""
        self._loader.load(layer)
        every = self._adapter.heads.every
        return every(self._buffers.key_rows[layer]), every(self._buffers.value_rows[layer])

    def fresh_states(self, layer: int) -> tuple[Tensor, Tensor]:
        """See `SelectionContext`."""
        self.probed += round(self.length * self._adapter.fresh_layers(layer))
        return self._adapter.fresh_states(ids_of(self._prompt), layer)

    def _probe(self, num_layers: int, queries: int) -> ProbePass:
        """A forward of the tokens that are computed in any case; what it costs is counted."""
        ids, places = some_of(self._prompt, self._computed)
        self.probed += len(ids) * num_layers
        return ProbePass(ids, places, self._buffers, num_layers, queries, self._loader.load)

    def _narrowed(self, probe: ProbePass, after: int, count: int) -> ProbePass:
        """The same with a shortlist, whose rows the loader brings first."""
        among = np.zeros(self.length, np.bool_)
        among[all_places(self.chunks).numpy()] = True
        among &= ~self._computed.numpy()  # a prompt that ends in a chunk has its last token computed
        self._loader.expect_narrowing(after)
        found = Shortlist(after, min(count, int(among.sum())), torch.from_numpy(among), self._loader.narrow)
        return replace(probe, before=self._loader.load_seen, shortlist=found)

    def _deviations(self) -> list[tuple[int, Tensor]]:
        """Place and deviations of every reused chunk, in prompt order; empty if no chunk has any."""
        chunks = sorted(self.chunks, key=lambda c: c.start)
        rows = known = [chunk.deviations for chunk in chunks if chunk.deviations is not None]
        if not known:
            return []
        if len(known) < len(chunks):
            usual = torch.cat(known).float().mean(0).to(known[0].dtype)
            rows = [usual.expand(c.tokens, -1) if c.deviations is None else c.deviations for c in chunks]
        return [(chunk.start, numbers) for chunk, numbers in zip(chunks, rows, strict=True)]


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
