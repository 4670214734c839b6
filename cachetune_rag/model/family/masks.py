"""Attention masks of a forward over some of the prompt's tokens.

The tokens stand at their true positions, so row i may attend to key j when position[i] >= j, and within the window on
sliding layers. A model gets the same structure that transformers' own `create_masks_for_generate` builds: one
mask, or a dict by layer type.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

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


def window_of(config: Any, decoder: nn.Module) -> int | None:
    """The sliding window that the model applies, None where it has none.

    A config may name a window that its architecture doesn't apply (a Mistral converted to Llama). The window counts only if the
    modelling code can build masks with one.
    """
    code = sys.modules[type(decoder).__module__]
    if not any(hasattr(code, name) for name in ("create_sliding_window_causal_mask", "create_masks_for_generate")):
        return None
    return getattr(config, "sliding_window", None)


def build(config: Any, window: int | None, positions: Tensor, length: int, dtype: torch.dtype) -> Any:
    """Additive masks for queries at `positions` [queries] over keys 0..length-1, each [1, 1, queries, length].

    Additive rather than boolean: attention would turn a boolean mask into this form again in every layer.
    """
    floor = torch.finfo(dtype).min

    def make(kind: str | None) -> Tensor:
        rows = allowed(window, kind, positions, length)
        return torch.zeros(rows.shape, dtype=dtype, device=positions.device).masked_fill_(~rows, floor)[None, None]

    kinds = set(getattr(config, "layer_types", None) or ())
    return {kind: make(kind) for kind in kinds} if kinds else make(None)


def placeholder(config: Any, device: torch.device) -> Any:
    """A tiny mask for forwards whose attention ignores masks. It keeps the model from building masks itself."""
    empty = torch.zeros(1, 1, 1, 1, dtype=torch.float32, device=device)
    kinds = set(getattr(config, "layer_types", None) or ())
    return dict.fromkeys(kinds, empty) if kinds else empty


def window_at(window: int | None, kind: str | None) -> int | None:
    """How many keys back, itself included, a query of a layer of this type sees; None for all."""
    return window if kind in (None, "sliding_attention") else None


def allowed(window: int | None, kind: str | None, positions: Tensor, length: int) -> Tensor:
    """Which keys 0..length-1 a query at each of `positions` may attend to, as bool [queries, length].

    `kind` is the layer's type, None where the config names none (then a window, if there is one, is every layer's).
    """
    keys = torch.arange(length, device=positions.device)
    rows = positions[:, None] >= keys[None]
    if (window := window_at(window, kind)) is not None:
        rows &= positions[:, None] - keys[None] < window
    return rows
