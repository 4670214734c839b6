"""Capture: chunks run through the model behind a lead-in, and their keys before rotation and their values are kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cachetune_rag.model.family import taps
from cachetune_rag.model.family.taps import StopForward
from cachetune_rag.model.family.value_cache import ValueCache
from cachetune_rag.model.plain import attention
from cachetune_rag.model.plain.forward import ModelForward


@dataclass(frozen=True)
class ChunkKV:
    """The keys and values of a chunk that are stored.

    Attributes:
        layers: for each layer, keys before rotation and values, each [tokens, kv_heads, head_dim].
        deviations: how far they were apart behind different lead-ins (see `MeanKV`); None if there was one.
    """

    layers: list[tuple[Tensor, Tensor]]
    deviations: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Number of chunk tokens."""
        return int(self.layers[0][0].shape[0])


@dataclass(frozen=True)
class LeadInKV:
    """The KV of a lead-in, behind which any number of chunks can be run.

    Attributes:
        tokens: its number of tokens.
        layers: for each layer, keys as rotated for positions 0, 1, ... and values, each [1, kv_heads, tokens, head_dim].
    """

    tokens: int
    layers: list[tuple[Tensor, Tensor]]


class ChunkCapture:
    """Runs chunks through one model and returns the keys and values that are stored. The caller switches gradients off.

    Args:
        forward: the model.
        attentions: the attention module of each layer.
        found: the tap of each layer, where its keys are read before rotation.
        reuse_beyond: see `ModelAdapter`.
        device: where the model is.

    Hooks see every forward of the model, so the caller holds the lock under which the model runs.
    """

    def __init__(
        self,
        forward: ModelForward,
        attentions: list[nn.Module],
        found: list[taps.Tap],
        reuse_beyond: int,
        device: torch.device,
    ):
        self._forward, self._attentions, self._taps = forward, attentions, found
        self._reuse_beyond, self._device = reuse_beyond, device

    def capture(self, chunks: Sequence[Sequence[int]], lead_in: Sequence[int]) -> list[ChunkKV]:
        """Run each chunk behind the lead-in, in one batch, and return its keys before rotation and its values.

        Args:
            chunks: token ids of each chunk, none empty.
            lead_in: token ids that are put before every chunk. Their own rows are dropped.
        """
        layers: list[tuple[Tensor, Tensor]] = []
        ids = pad_right([[*lead_in, *c] for c in chunks], self._device)
        self._run(ids, None, lambda _layer, key, _rotated, value: layers.append((key, value)))
        start = len(lead_in)
        return [
            ChunkKV([(k[row, start : start + len(c)], v[row, start : start + len(c)]) for k, v in layers])
            for row, c in enumerate(chunks)
        ]

    def lead_kv(self, lead_in: Sequence[int]) -> LeadInKV:
        """Run a lead-in (at least one token) once, for many calls of `capture_behind`."""
        layers: list[tuple[Tensor, Tensor]] = []
        ids, count = pad_right([lead_in], self._device), len(lead_in)

        def keep(_layer: int, _key: Tensor, rotated: Tensor, value: Tensor) -> None:
            layers.append((rotated[:, :, :count].clone(), value.transpose(1, 2)[:, :, :count].clone()))

        self._run(ids, None, keep)
        return LeadInKV(count, layers)

    def capture_behind(
        self, chunks: Sequence[Sequence[int]], lead_in: LeadInKV | None, receive: Callable[[int, Tensor, Tensor], None]
    ) -> None:
        """Run each chunk behind a lead-in that was run before (or behind none), in one batch, and pass on each layer when it is done.

        `receive(layer, keys, values)` gets keys before rotation and values, [batch, longest, kv_heads, head_dim] each.
        Rows behind the end of a shorter chunk are to be ignored.
        """
        ids = pad_right(chunks, self._device)
        self._run(ids, lead_in, lambda layer, key, _rotated, value: receive(layer, key, value))

    def _run(
        self, ids: Tensor, lead_in: LeadInKV | None, receive: Callable[[int, Tensor, Tensor, Tensor], None]
    ) -> None:
        """Run ids [batch, tokens] behind `lead_in`.

        `receive(layer, key, rotated, value)` gets keys before and after rotation and values: [batch, tokens, kv_heads,
        head_dim], but the rotated ones with heads before tokens.
        """
        count, start = ids.shape[1], 0 if lead_in is None else lead_in.tokens
        tapped: dict[int, Tensor] = {}

        def on_key(layer: int, output: Tensor) -> None:
            tapped[layer] = self._taps[layer].key(output)

        def on_update(layer: int, rotated: Tensor, value: Tensor) -> None:
            key = tapped.pop(layer)
            receive(layer, key[:, :count], rotated[:, :, :count], value.transpose(1, 2)[:, :count])
            if layer == len(self._attentions) - 1:
                raise StopForward  # the output of the last layer is not needed

        positions = torch.arange(start, start + count, device=self._device)
        if start + count <= self._reuse_beyond:
            # An extra token, which no other token sees, selects the long-context frequencies that prompts with reuse are served by.
            ids = torch.cat((ids, ids[:, -1:]), dim=1)
            positions = torch.cat((positions, positions.new_tensor([self._reuse_beyond])))
        cache = ValueCache(len(self._attentions), on_update, None if lead_in is None else lead_in.layers)
        with taps.tapped(self._attentions, [t.key_module for t in self._taps], on_key), suppress(StopForward):
            if lead_in is None:
                self._forward.without_head(ids, cache, positions)
                return
            mask = self._forward.mask(positions, start + ids.shape[1])
            with self._forward.masked_attention(), attention.by_position(positions):
                self._forward.without_head(ids, cache, positions, attention_mask=mask)


def pad_right(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Token ids [batch, longest], padded on the right, which causal attention never sees."""
    longest = max(len(r) for r in rows)
    return torch.tensor([[*r, *([r[-1]] * (longest - len(r)))] for r in rows], device=device)
