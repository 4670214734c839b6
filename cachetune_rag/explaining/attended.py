"""What the query attends to, and what reuse leaves of a prompt's expected error: one probe over a prompt that was read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cachetune_rag.model import KVBuffers, ModelAdapter
from cachetune_rag.model.plain.probe import ProbePass
from cachetune_rag.reuse.account import Account
from cachetune_rag.reuse.state import PrefillState
from cachetune_rag.text.prompts.prompt import Span

WATCHED = 64
"""The most tokens of the query that are watched; as many as the default selector watches."""


@dataclass(frozen=True, eq=False)
class Looked:
    """What a probe found.

    Attributes:
        watched: how many of the prompt's last tokens were watched.
        attention: share of their attention that each token gets, float32 [length]; it sums up to 1.
    """

    watched: int
    attention: NDArray[np.float32]


class QueryProbe:
    """Runs a read prompt's last tokens once more, and watches them. The caller holds the model's lock.

    The rows that it computes are those that are there already.

    Args:
        adapter: the model.
        state: the prompt as it was read; nothing was decoded behind it, or its cache was rewound.
    """

    def __init__(self, adapter: ModelAdapter, state: PrefillState):
        self._adapter, self._ids = adapter, state.prompt.ids
        length = len(self._ids)
        self._buffers: KVBuffers = state.buffers or adapter.rows_of_cache(state.cache, length)
        end = max((span.end for span in state.prompt.spans), default=0)
        self.watched = min(WATCHED, length, max(1, length - end) if end else length)

    def look(self) -> Looked:
        """The attention of the watched tokens, over all layers."""
        received = self._adapter.received_attention(self._probe()).float().cpu() / self._adapter.num_layers
        return Looked(self.watched, received.numpy())

    def expected_error(self, account: Account) -> NDArray[np.float32] | None:
        """The expected error of each stored chunk's tokens (see `Probe.expected_error`), had none of them been recomputed: float32
        [length]; None if no chunk has deviations.
        """
        deviations = _placed(account, len(self._ids))
        if deviations is None:
            return None
        error: NDArray[np.float32] = self._adapter.expected_error(self._probe(), deviations).float().cpu().numpy()
        return error

    def _probe(self) -> ProbePass:
        length, count = len(self._ids), self.watched
        ids = torch.tensor(self._ids[length - count :], dtype=torch.int64)
        places = torch.arange(length - count, length)
        return ProbePass(ids, places, self._buffers, self._adapter.num_layers, count, lambda _: None)


def _placed(account: Account, length: int) -> Tensor | None:
    """The deviations of every token of the prompt, 0 outside of stored chunks. A chunk without any gets the mean of the others'."""
    known = [chunk.deviations for chunk in account.chunks if chunk.deviations is not None]
    if not known:
        return None
    usual = torch.cat(known).float().mean(0).to(known[0].dtype)
    placed = torch.zeros(length, known[0].shape[1], dtype=known[0].dtype)
    for chunk in account.chunks:
        if chunk.outcome == "stored":
            count = chunk.end - chunk.start
            # A prompt that ends in a chunk has that chunk's last token computed: it has no deviation.
            rows = usual.expand(count, -1) if chunk.deviations is None else chunk.deviations
            placed[chunk.start : chunk.start + min(count, len(rows))] = rows[:count]
    return placed


def top_places(attention: NDArray[np.float32], spans: Sequence[Span], most: int) -> list[int]:
    """Places of the chunk tokens that get most attention, the first ones first; of all but the prompt's first token, where it has no chunks.

    A query attends to itself above all, which says nothing about the chunks.
    """
    wanted = np.zeros(len(attention), np.bool_)
    for span in spans:
        wanted[span.start : span.end] = True
    wanted |= not wanted.any()
    wanted[0] = False
    order = np.argsort(np.where(wanted, -attention, 1.0), kind="stable")[:most]
    return [int(place) for place in order if wanted[place] and attention[place] > 0]
