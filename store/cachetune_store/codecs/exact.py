"""The model's own numbers, bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import LayerSpec, dtype_name, torch_dtype
from .base import Codec

__all__ = ["ExactCodec"]

_SAFETENSORS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


class ExactCodec(Codec):
    """A row is K, then V, flattened, in the model's dtype. Decoding is two views."""

    name = "exact"
    error = "none"

    def row_bytes(self, spec: LayerSpec, dtype: str | torch.dtype) -> int:
        """Bytes of one row: all of K and V."""
        return self.columns(spec, dtype)[1] * torch_dtype(dtype).itemsize

    def columns(self, spec: LayerSpec, dtype: str | torch.dtype) -> tuple[str, int]:
        """The model's dtype, and the width of K plus that of V."""
        return _SAFETENSORS[dtype_name(dtype)], spec.heads * (spec.head_dim + spec.v_head_dim)

    def encode(self, k: Tensor, v: Tensor) -> Tensor:
        """K beside V, as bytes."""
        return torch.cat((k.flatten(1), v.flatten(1)), dim=1).view(torch.uint8)

    def decode(self, rows: Tensor, spec: LayerSpec, dtype: str | torch.dtype) -> tuple[Tensor, Tensor]:
        """Views of `rows`; a copy is made only of rows that don't lie on the dtype's boundaries."""
        wanted = torch_dtype(dtype)
        if rows.stride(1) != 1 or rows.storage_offset() % wanted.itemsize or rows.stride(0) % wanted.itemsize:
            rows = rows.clone(memory_format=torch.contiguous_format)
        numbers = rows.view(wanted)
        k, v = numbers.split((spec.heads * spec.head_dim, spec.heads * spec.v_head_dim), dim=1)
        return k.unflatten(1, (spec.heads, spec.head_dim)), v.unflatten(1, (spec.heads, spec.v_head_dim))
