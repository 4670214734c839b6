"""What a selector sees of one prompt (`SelectionContext`): the model and the stored rows."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cachetune_rag.model import KVBuffers, ModelAdapter
from cachetune_rag.model.plain.probe import ProbePass
from cachetune_rag.model.plain.shortlist import MasksNotNamedError, Shortlist
from cachetune_rag.reuse.layer_loader import LayerLoader
from cachetune_rag.reuse.source import Source
from cachetune_rag.selection.base import ReusedChunk, all_places
from cachetune_rag.text.prompts.continuations import Continuation
from cachetune_rag.text.prompts.finders import NO_FINDERS, Finders
from cachetune_rag.text.prompts.prompt import Prompt

BETWEEN = 64
"""The most tokens between two reused chunks that a look computes: what separates chunks, or a heading. More are a passage that isn't stored."""
BEHIND = 192
"""The most tokens behind the last reused chunk that a look computes, the prompt's last ones. With what separates chunks, these are few enough for the
graphs that a warm-up captures (`device_forward._PROBED_TOKENS`)."""

_T = TypeVar("_T")


class PromptView:
    """See `SelectionContext`.

    Args:
        adapter: the model.
        prompt: the prompt.
        sources: the reused chunks, with the rows of each that are read.
        computed: bool [length], the tokens that are computed whatever the selector chooses.
        buffers: where the keys and values are put together.
        loader: brings the stored rows there.
        kept: tokens at the prompt's beginning whose rows are in the buffers already.
        finders: find what the prompt's tokens spell.

    Attributes:
        probed: token-layers that the selector has had computed so far.
        ready: tokens at the prompt's beginning whose rows are there in all layers: those that were kept, and once the selector looked at all
            layers, all tokens before the first reused chunk.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        prompt: Prompt,
        sources: Sequence[Source],
        computed: Tensor,
        buffers: KVBuffers,
        loader: LayerLoader,
        kept: int = 0,
        finders: Finders = NO_FINDERS,
    ):
        self.chunks = [source.as_reused(loader.deviations) for source in sources]
        self.length, self.num_layers = len(prompt.ids), adapter.num_layers
        self.probed, self.ready = 0, kept
        self._adapter, self._prompt, self._computed = adapter, prompt, computed
        self._buffers, self._loader, self._finders = buffers, loader, finders
        self._seen = computed  # those of the computed tokens that the last look computed

    @property
    def seed(self) -> int:
        """A number that depends on the prompt's token ids alone."""
        return int.from_bytes(hashlib.sha256(repr(self._prompt.ids).encode()).digest()[:7])

    @property
    def ids(self) -> NDArray[np.int64]:
        """See `SelectionContext`."""
        return self._prompt.ids_array

    @property
    def sentences(self) -> NDArray[np.int64]:
        """See `SelectionContext`."""
        return self._finders.sentences(self._prompt)

    @cached_property
    def continuations(self) -> Sequence[Continuation]:
        """See `SelectionContext`."""
        return self._finders.continuations(self._prompt)

    @cached_property
    def asked_from(self) -> int:
        """See `SelectionContext`."""
        return self._finders.last_turn(self._prompt)

    def observe_attention(
        self, num_layers: int, queries: int, observe: Callable[[int, Tensor], None], whole: bool = False
    ) -> None:
        """See `SelectionContext`."""
        self._look(num_layers, queries, whole, lambda probe: self._adapter.observe_attention(probe, observe))

    def received_attention(self, num_layers: int, queries: int, whole: bool = False) -> Tensor:
        """See `SelectionContext`."""
        return self._look(num_layers, queries, whole, self._adapter.received_attention)

    def expected_error(
        self, num_layers: int, queries: int, shortlist: tuple[int, int] | None = None, whole: bool = False
    ) -> Tensor:
        """See `SelectionContext`."""
        end = max(chunk.start + chunk.tokens for chunk in self.chunks)
        # A prompt that ends in a chunk has its last token computed anyway.
        queries = min(queries, max(1, self.length - max(end, self.asked_from)))
        pieces = self._deviations()
        if not pieces:
            self._loader.start()
            return self.received_attention(num_layers, queries, whole)

        def look(probe: ProbePass) -> Tensor:
            if shortlist is not None:
                probe = self._narrowed(probe, *shortlist)
            self._loader.start()
            total = self._adapter.expected_error(probe, self._loader.copy_deviations(pieces, num_layers))
            return total / min(queries, len(probe.ids))

        return self._look(num_layers, queries, whole, look)

    def next_token(self, num_layers: int) -> Tensor:
        """See `SelectionContext`."""
        ids, places = some_of(self._prompt, self._computed)
        if num_layers == self.num_layers and self._seen is self._computed:
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

    def _look(self, num_layers: int, queries: int, whole: bool, look: Callable[[ProbePass], _T]) -> _T:
        """Have `look` run tokens that are computed in any case through the first layers: all of them, or those that stand in no new passage.
        What it costs is counted.
        """
        new = None if whole else new_passages(self._computed, self.chunks)
        try:
            return self._looked(num_layers, queries, new, look)
        except MasksNotNamedError:
            return self._looked(num_layers, queries, None, look)

    def _looked(self, num_layers: int, queries: int, new: Tensor | None, look: Callable[[ProbePass], _T]) -> _T:
        seen = self._computed if new is None else self._computed & ~new
        ids, places = some_of(self._prompt, seen)
        found = look(ProbePass(ids, places, self._buffers, num_layers, queries, self._loader.load, left_out=new))
        self._seen = seen
        self.probed += len(ids) * num_layers
        if num_layers == self.num_layers:
            self.ready = max(self.ready, self._first_reused())
        return found

    def _first_reused(self) -> int:
        """How many tokens stand before the first reused chunk, and are not the prompt's last one."""
        return min((chunk.start for chunk in self.chunks), default=0)

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


def new_passages(computed: Tensor, chunks: Sequence[ReusedChunk]) -> Tensor | None:
    """Passages of a prompt that are not stored, or not known, behind its first reused chunk: bool [length] on the host; None if there are none.

    A selector's look leaves them out: they are computed in the end in any case, and to compute them for the look as well would take as long again.
    What stands before the first reused chunk isn't left out, because its rows are final once they are computed.

    Args:
        computed: bool [length], the tokens that are computed whatever is chosen.
        chunks: the reused chunks.
    """
    found = np.zeros(len(computed), np.bool_)
    spans = sorted((chunk.start, chunk.start + chunk.tokens) for chunk in chunks)
    for (_, end), (start, _) in pairwise(spans):
        if start - end > BETWEEN:
            found[end:start] = True
    if spans:
        found[spans[-1][1] : max(0, len(computed) - BEHIND)] = True
    return torch.from_numpy(found) if found.any() else None


# On the host, NumPy: it reads a long tuple faster than torch, and wakes no threads for a few thousand numbers.


def ids_of(prompt: Prompt) -> Tensor:
    """The prompt's token ids on the host, int64 [length]."""
    return torch.from_numpy(prompt.ids_array.copy())  # of memory that nobody may write to, torch makes no tensor


def some_of(prompt: Prompt, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and places of the tokens where `wanted` is true, on the host."""
    places = wanted.numpy().nonzero()[0]
    return torch.from_numpy(prompt.ids_array[places]), torch.from_numpy(places)
