"""Shapes of a stored chunk."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .keys import DTYPES

__all__ = ["ChunkLayout", "LayerSpec", "dtype_name", "torch_dtype"]

_TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_NAMES = {value: name for name, value in _TORCH.items()}


def torch_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """The torch dtype named `dtype` ("float32", "bfloat16", "float16")."""
    found = _TORCH.get(dtype) if isinstance(dtype, str) else dtype
    if found not in _NAMES:
        raise ValueError(f"dtype {dtype!r} is not stored; allowed: {', '.join(DTYPES)}")
    return found


def dtype_name(dtype: str | torch.dtype) -> str:
    """The name of `dtype` as a layout spells it."""
    return _NAMES[torch_dtype(dtype)]


@dataclass(frozen=True)
class LayerSpec:
    """Widths of one layer: key/value heads, and the length of a head's key and of its value."""

    heads: int
    head_dim: int
    v_head_dim: int

    def __post_init__(self) -> None:
        if min(self.heads, self.head_dim, self.v_head_dim) < 1:
            raise ValueError(f"{self} has a width below 1")


@dataclass(frozen=True)
class ChunkLayout:
    """What a chunk's rows look like: tokens (rows a layer), layers, dtype by name and codec by name."""

    tokens: int
    layers: tuple[LayerSpec, ...]
    dtype: str
    codec: str

    def __post_init__(self) -> None:
        if self.tokens < 1 or not self.layers:
            raise ValueError(f"a chunk has 1 token and 1 layer at least, not {self.tokens} and {len(self.layers)}")
        torch_dtype(self.dtype)

    @property
    def deviation_columns(self) -> int:
        """Deviations of a token: one for the keys and one for the values of every head of every layer."""
        return 2 * sum(spec.heads for spec in self.layers)
