"""What the kernels compute, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def attend_reference(
    query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, *, scale: float, window: int | None = None
) -> tuple[Tensor, Tensor]:
    """What `attend` computes, in float64 with the mask written out, and the attention weights [heads, tokens, length].

    Keys and values are [length, kv_heads, dim]; rows of `positions` below 0 come out as zeros.
    """
    group = query.shape[1] // keys.shape[1]
    k = keys.double().repeat_interleave(group, 1).transpose(0, 1)
    v = values.double().repeat_interleave(group, 1).transpose(0, 1)
    places = torch.arange(keys.shape[0], device=keys.device)
    seen = places[None] <= positions[:, None]
    if window is not None:
        seen &= positions[:, None] - places[None] < window
    scores = (query[0].double() @ k.transpose(1, 2) * scale).masked_fill(~seen[None], float("-inf"))
    weights = scores.softmax(-1).nan_to_num(0.0)
    return (weights @ v).transpose(0, 1)[None], weights


def turn_reference(keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The half-split rotation that `place` applies: keys [n, heads, dim] by cos and sin [n, width], in their dtype."""
    width = cos.shape[1]
    turned, rest = keys[..., :width], keys[..., width:]
    low, high = turned.chunk(2, -1)
    swapped = torch.cat((-high, low), -1)
    return torch.cat((turned * cos[:, None] + swapped * sin[:, None], rest), -1)
