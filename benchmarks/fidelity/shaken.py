"""How far the next token moves if the stored rows of a prompt are shaken as much as they are expected to be off.

A sign that is dearer than what a request knows anyway: each draw runs the tokens behind the chunks once more. It shows what a sign is worth that sees the
whole way from an error of a row to the next token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from cachetune_rag import CacheTune
from cachetune_rag.measuring.divergence import kl_divergence
from cachetune_rag.reuse.state import PrefillState
from cachetune_rag.selection import ReusedChunk

DRAWS = 4
"""How often each choice is shaken. All choices of a prompt share the draws, so that their differences aren't chance."""


class Shaken:
    """Shakes one prompt of which nothing was recomputed.

    Args:
        engine: has the model.
        nothing: the prompt.
        chunks: its reused chunks.
    """

    def __init__(self, engine: CacheTune, nothing: PrefillState, chunks: Sequence[ReusedChunk]):
        self._engine = engine
        self._ids = torch.tensor(nothing.prompt.ids, device=engine.adapter.device)
        self._rows = [
            (layer.keys[:, :, : len(self._ids)], layer.values[:, :, : len(self._ids)]) for layer in nothing.cache.layers
        ]
        self._amounts = self._amounts_of(chunks)
        # A prompt that ends in a chunk has its last token run again all the same.
        end = min(max(chunk.start + chunk.tokens for chunk in chunks), len(self._ids) - 1)
        self._again = {"shaken": self._ids[end:], "shaken_last": self._ids[-1:]}
        # Run as the shaken ones are, so that nothing but the shaking differs.
        self._still = {name: self._next_token(self._rows, ids) for name, ids in self._again.items()}

    def signs(self, reused: Sequence[int]) -> dict[str, float]:
        """Mean KL of the shaken prompt's next token from that of the still one, in nats.

        Args:
            reused: places of the tokens that are shaken.

        Returns:
            `shaken`, with all tokens behind the chunks run again; `shaken_last`, with the last token alone.
        """
        chosen = torch.zeros(len(self._ids), 1, device=self._ids.device)
        chosen[list(reused)] = 1
        found = dict.fromkeys(self._again, 0.0)
        for draw in range(DRAWS):
            rows = list(self._shake(chosen, draw))
            for name, ids in self._again.items():
                found[name] += float(kl_divergence(self._still[name], self._next_token(rows, ids))[0]) / DRAWS
        return found

    def _amounts_of(self, chunks: Sequence[ReusedChunk]) -> list[tuple[Tensor, Tensor]]:
        """How far the keys and the values of each layer are expected to be off, each [kv_heads, length, 1]; 0 where nothing is known of them."""
        heads = [(keys.shape[1], values.shape[1]) for keys, values in self._rows]
        amounts = torch.zeros(len(self._ids), sum(map(sum, heads)))
        for chunk in chunks:
            if chunk.deviations is not None:
                amounts[chunk.start : chunk.start + chunk.tokens] = chunk.deviations.float().cpu()
        parts = amounts.T[:, :, None].to(self._ids.device).split([count for both in heads for count in both])
        return list(zip(parts[::2], parts[1::2], strict=True))

    def _shake(self, chosen: Tensor, draw: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The rows with an error of no particular direction, whose length is the expected one."""
        random = torch.Generator(self._ids.device).manual_seed(draw)
        for states, amounts in zip(self._rows, self._amounts, strict=True):
            shaken = []
            for each, amount in zip(states, amounts, strict=True):
                noise = torch.randn(each.shape, generator=random, device=each.device) * each.shape[-1] ** -0.5
                shaken.append(each + (noise * amount * chosen).to(each.dtype))
            yield shaken[0], shaken[1]

    def _next_token(self, rows: Sequence[tuple[Tensor, Tensor]], ids: Tensor) -> Tensor:
        """The logits behind the prompt's last tokens, [1, vocab], if the rows of those before are these."""
        cache: Cache = DynamicCache()
        before = len(self._ids) - len(ids)
        for number, (keys, values) in enumerate(rows):
            cache.update(keys[:, :, :before], values[:, :, :before], number)
        return self._engine.adapter.forward(ids, cache)
