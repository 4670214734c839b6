"""What the kernels compute, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

_Turning = tuple[Tensor, Tensor, Tensor, Tensor]


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


def disturb_reference(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    hidden: Tensor,
    gain: Tensor,
    key_deviation: Tensor,
    value_deviation: Tensor,
    *,
    watched: int,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """What `nearness` and `disturb` compute, summed over heads: float64 [length], every distance written out.

    Args:
        query, keys, values, positions, scale, window: as for `attend_reference`.
        hidden: layer inputs [tokens, width].
        gain: [heads].
        key_deviation, value_deviation: [length, kv_heads].
        watched: how many last tokens.
    """
    heads, dim = query.shape[1], query.shape[3]
    group = heads // keys.shape[1]
    out, weights = attend_reference(query, keys, values, positions, scale=scale, window=window)
    total = torch.zeros(keys.shape[0], dtype=torch.float64, device=keys.device)
    for head in range(heads):
        key_off, value_off = key_deviation[:, head // group].double(), value_deviation[:, head // group].double()
        for token in range(query.shape[2])[-watched:]:
            near = 1 / hidden[token].double().norm()
            apart = (values[:, head // group].double() - out[0, token, head]).norm(dim=-1)
            steep = query[0, head, token].double().norm() * gain[head] * scale / dim**0.5
            total += weights[head, token] * near * (value_off + steep * apart * key_off)
    return total


def shift_reference(
    stored: Tensor,
    fresh: Tensor,
    positions: Tensor,
    known: Tensor,
    spans: list[tuple[int, int]],
    strength: float,
    turn: _Turning | None,
) -> Tensor:
    """What `shift` makes of the stored keys or values of one layer: float64 [length, heads, dim].

    Args:
        stored: [length, heads, dim].
        fresh: of the computed tokens, [tokens, heads, dim].
        positions: [tokens], below 0 for padding.
        known: [tokens], 0 for tokens that are left out.
        spans: (start, end) of each chunk.
        strength: see `model.shift.ChunkShift`; its kappa is 2 here.
        turn: cos, sin [length, dim], partner and sign [dim] for keys that are rotated; None for values.
    """
    shifted = stored.double().clone()
    for start, end in spans:
        inside = [i for i, p in enumerate(positions.tolist()) if start <= p < end and known[i]]
        if not inside:
            continue
        places = positions[inside]
        off = fresh[inside].double() - stored[places].double()
        if turn is not None:
            cos, sin, partner, sign = (t.double() if t.is_floating_point() else t.long() for t in turn)
            c, s = cos[places][:, None], sin[places][:, None]
            off = (c * off - s * sign * off[..., partner]) / (c * c + s * s)
        moved = off.sum(0) * strength / (len(inside) + 2)
        if turn is not None:
            moved = cos[start:end, None] * moved + sin[start:end, None] * (sign * moved[..., partner])
        shifted[start:end] += moved
    return shifted
