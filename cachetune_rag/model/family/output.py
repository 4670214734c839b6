"""The output projection of an attention layer, head by head: what an error of a value, or of a head's output, comes to
in the residual stream."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cachetune_rag.model.loaded.foreign import ForeignLinear

_NAMES = ("o_proj", "dense", "out_proj")
"""Its usual names; in other families the last module of its shape is used (query projections come before it)."""


def output_heads(attention: nn.Module, heads: int, v_head_dim: int) -> Tensor | None:
    """The output projection Wo of an attention module, float32 [hidden, heads, v_head_dim]; None where there is none.

    It is known by its shape: a linear module from heads * v_head_dim to the model's width. One whose weight isn't a
    plain matrix of that shape (packed by a quantiser, transposed as in GPT-2's Conv1D) counts as none.

    Args:
        attention: an attention module of transformers.
        heads: its query heads.
        v_head_dim: width of a head's value.
    """
    config: Any = getattr(attention, "config", None)
    hidden = getattr(config, "hidden_size", None)
    found: dict[str, Tensor] = {}
    for name, module in attention.named_children():
        weight = getattr(module, "weight", None)
        shape = getattr(module, "out_features", None), getattr(module, "in_features", None)
        if not isinstance(weight, Tensor) or not weight.is_floating_point() or tuple(weight.shape) != shape:
            continue
        if shape[1] == heads * v_head_dim and hidden in (None, shape[0]):
            found[name] = weight
    if not found:
        return None
    weight = next((found[name] for name in _NAMES if name in found), list(found.values())[-1])
    return weight.detach().float().unflatten(1, (heads, v_head_dim))


def input_share(attention: nn.Module, layer: nn.Module) -> float:
    """Share of a decoder layer's matrix weights that an attention module needs for queries, keys and values: all of its own but
    the output projection's. What a token costs up to there, in layers (of experts, all are counted).
    """
    outputs = [part for name, part in attention.named_children() if name in _NAMES]
    inputs = _matrices(attention) - sum(map(_matrices, outputs))
    return inputs / max(1, _matrices(layer))


def _matrices(module: nn.Module) -> int:
    """The number of elements of all its matrices."""
    foreign = [part for part in module.modules() if isinstance(part, ForeignLinear)]
    return sum(p.numel() for p in module.parameters() if p.dim() > 1) + sum(
        f.in_features * f.out_features for f in foreign
    )


def gram(heads_weight: Tensor, kv_heads: int) -> Tensor:
    """The mean over a key-value head's query heads g of Wo[:, g]^T Wo[:, g], float32 [kv_heads, v_dim, v_dim].

    d^T gram[h] d is then the squared length, in the layer's output, of an error d of a value that is attended to in full.

    Args:
        heads_weight: from `output_heads`, [hidden, heads, v_dim].
        kv_heads: key-value heads; query head g reads number g // (heads / kv_heads).
    """
    by_head = heads_weight.transpose(0, 1)
    products: Tensor = torch.bmm(by_head.transpose(1, 2), by_head)
    return products.unflatten(0, (kv_heads, -1)).mean(1)


def gain(heads_weight: Tensor) -> Tensor:
    """|Wo[:, g]| (Frobenius) / sqrt(v_dim) of every query head g, float32 [heads]: how much longer a random error of a
    head's output becomes in the layer's output."""
    return heads_weight.flatten(2).norm(dim=(0, 2)) / heads_weight.shape[2] ** 0.5
