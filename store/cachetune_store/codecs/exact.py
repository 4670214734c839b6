"""The codec that keeps the model's numbers bit for bit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..layout import HeadBytes, LayerSpec, RowFormat, dtype_name, torch_dtype
from .base import Codec

__all__ = ["ExactCodec"]

_SAFETENSORS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


class ExactCodec(Codec):
    """A row is K and then V, flattened, in the model's dtype. Decoding makes two views."""

    name = "exact"
    error = "none"

    def row_format(self, spec: LayerSpec, dtype: str | torch.dtype) -> RowFormat:
        """All of K and V."""
        return RowFormat(_numbers(spec) * torch_dtype(dtype).itemsize)

    def head_bytes(self, spec: LayerSpec, dtype: str | torch.dtype, heads: slice) -> HeadBytes:
        """Their K and their V."""
        item, count = torch_dtype(dtype).itemsize, heads.stop - heads.start
        key, value = spec.head_dim * item, spec.v_head_dim * item
        return HeadBytes.of([(heads.start * key, count * key), (spec.heads * key + heads.start * value, count * value)])

    def declare(self, tokens: int, spec: LayerSpec, dtype: str | torch.dtype) -> tuple[str, list[int]]:
        """The model's dtype, and the width of K plus that of V."""
        return _SAFETENSORS[dtype_name(dtype)], [tokens, _numbers(spec)]

    def encode(self, k: Tensor, v: Tensor) -> Tensor:
        """K beside V, as bytes."""
        return torch.cat((k.flatten(1), v.flatten(1)), dim=1).view(torch.uint8).flatten()

    def decode(
        self, encoded: Tensor, spec: LayerSpec, dtype: str | torch.dtype, pieces: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Views of `encoded`. It is only copied if its bytes are not aligned for the dtype."""
        wanted = torch_dtype(dtype)
        if encoded.storage_offset() % wanted.itemsize:
            encoded = encoded.clone()
        numbers = encoded.view(wanted).view(-1, _numbers(spec))
        k, v = numbers.split((spec.heads * spec.head_dim, spec.heads * spec.v_head_dim), dim=1)
        return k.unflatten(1, (spec.heads, spec.head_dim)), v.unflatten(1, (spec.heads, spec.v_head_dim))


def _numbers(spec: LayerSpec) -> int:
    return spec.heads * (spec.head_dim + spec.v_head_dim)
