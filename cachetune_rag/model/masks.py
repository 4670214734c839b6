"""Attention masks of a forward over some of the prompt's tokens.

The tokens stand at their true positions, so row i may attend to key j when position[i] >= j, and within the window on
sliding layers. A model gets the same structure that transformers' own `create_masks_for_generate` builds: one
mask, or a dict by layer type.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cachetune_rag.errors import UnsupportedModelError

_KNOWN = {"full_attention", "sliding_attention"}


def check_layer_types(config: Any, architecture: str) -> None:
    """Refuse attention kinds for which reuse of single tokens is not defined or not built."""
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds - _KNOWN:
        raise UnsupportedModelError(
            f"{architecture} has layers of type {', '.join(sorted(kinds - _KNOWN))}: only full_attention and "
            "sliding_attention layers keep one key and value per token that can be reused elsewhere "
            "(linear-attention and state-space layers keep a running state, chunked attention has no true-position mask)."
        )
    if not kinds and getattr(config, "attention_chunk_size", None) is not None:
        raise UnsupportedModelError(f"{architecture} uses chunked attention, which has no mask by true positions here.")


def build(config: Any, positions: Tensor, length: int, dtype: torch.dtype) -> Any:
    """Additive masks for queries at `positions` [queries] over keys 0..length-1, each [1, 1, queries, length].

    Additive rather than boolean: attention would turn a boolean mask into this form again in every layer.
    """
    floor = torch.finfo(dtype).min

    def make(kind: str | None) -> Tensor:
        rows = allowed(config, kind, positions, length)
        return torch.zeros(rows.shape, dtype=dtype, device=positions.device).masked_fill_(~rows, floor)[None, None]

    kinds = set(getattr(config, "layer_types", None) or ())
    return {kind: make(kind) for kind in kinds} if kinds else make(None)


def allowed(config: Any, kind: str | None, positions: Tensor, length: int) -> Tensor:
    """Which keys 0..length-1 a query at each of `positions` may attend to, as bool [queries, length].

    `kind` is the layer's type, None where the config names none (then a window, if there is one, is every layer's).
    """
    keys = torch.arange(length, device=positions.device)
    rows = positions[:, None] >= keys[None]
    window = getattr(config, "sliding_window", None)
    if window is not None and kind in (None, "sliding_attention"):
        rows &= positions[:, None] - keys[None] < window
    return rows
