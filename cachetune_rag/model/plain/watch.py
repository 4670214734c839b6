"""Attention that computes its weights explicitly, for the last tokens of a forward: fused attention doesn't return them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

FEW = 64
"""Up to this many tokens, attention of all of them is computed here: fused attention would read all keys again for a few tokens."""


@dataclass(frozen=True)
class Shown:
    """What the watched tokens do in one layer.

    Rows of one key-value head are its query heads' of the first token, then those of the next one: the last tokens of many are
    a view.

    Attributes:
        layer: its number.
        query: rotated, [kv_heads, tokens * group, dim].
        weights: attention, float32 [kv_heads, tokens * group, keys], each row a distribution over the keys.
        values: of these keys, [kv_heads, keys, v_dim].
        outputs: what it brings together, [kv_heads, tokens * group, v_dim]; None where that wasn't computed.
    """

    layer: int
    query: Tensor
    weights: Tensor
    values: Tensor
    outputs: Tensor | None


def rows_of_heads(query: Tensor, kv_heads: int) -> Tensor:
    """[heads, tokens, dim] -> [kv_heads, tokens * group, dim], where query head g reads number g // group."""
    return query.unflatten(0, (kv_heads, -1)).transpose(1, 2).flatten(1, 2)


def heads_of_rows(rows: Tensor, tokens: int) -> Tensor:
    """[kv_heads, tokens * group, n] -> [heads, tokens, n]."""
    return rows.unflatten(1, (tokens, -1)).transpose(1, 2).flatten(0, 1)


class Watch:
    """The last tokens of one forward in float32, whose attention is shown layer by layer.

    Args:
        tokens: how many.
        show: gets every layer's.
    """

    def __init__(self, tokens: int, show: Callable[[Shown], None]):
        self.tokens, self.show = tokens, show
        self._clear: dict[int, tuple[Tensor, int]] = {}

    def taken(self, count: int) -> int:
        """How many of the last of `count` tokens `attend` computes: the watched ones, or all tokens if they are few."""
        return count if count <= FEW else self.tokens

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None
    ) -> Tensor:
        """The attention of the last tokens alone: [1, heads, tokens taken, v_dim].

        Args:
            layer: its number.
            query: rotated, of all tokens of the forward, [1, heads, tokens, dim].
            key, value: of the prompt, [1, kv_heads, keys, dim].
            mask: additive, [1, 1, tokens, keys].
            scale: of the scores; None for 1 / sqrt(dim).
        """
        kv_heads, _, dim = key.shape[1:]
        taken = self.taken(query.shape[2])
        asked = rows_of_heads(query[0, :, -taken:], kv_heads)
        scores = (asked * (dim**-0.5 if scale is None else scale)) @ key[0].transpose(1, 2)
        by_token = scores.unflatten(1, (taken, -1))
        others, clear = taken - self.tokens, self._columns_clear(mask)
        by_token[:, :others] += mask[0, :, -taken : -self.tokens, None]
        by_token[:, others:, :, clear:] += mask[0, :, -self.tokens :, None, clear:]
        weights = scores.softmax(-1)
        outputs = weights @ value[0]
        first = others * (query.shape[1] // kv_heads)
        self.show(Shown(layer, asked[:, first:], weights[:, first:], value[0], outputs[:, first:]))
        return heads_of_rows(outputs, taken)[None]

    def _columns_clear(self, mask: Tensor) -> int:
        """How many keys, from the first on, all watched tokens see: usually all keys before the watched tokens."""
        # All layers of one type get the same mask. It is kept alive, so that no other mask gets its id.
        if id(mask) not in self._clear:
            hidden = mask[0, 0, -self.tokens :].any(0).nonzero()
            self._clear[id(mask)] = mask, int(hidden[0]) if len(hidden) else mask.shape[3]
        return self._clear[id(mask)][1]
