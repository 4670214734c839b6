"""What codecs have in common that write a byte for each number and a scale for each head."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import NonFiniteError
from ..layout import HeadBytes, LayerSpec, RowFormat, torch_dtype
from ..printing import shown
from .base import Codec

__all__ = ["ScaledCodec"]


class ScaledCodec(Codec):
    """K and V each have one float32 scale for each token and head. It is chosen so that the head's largest number just fits.

    A row is: K's scales, V's scales, K's bytes, V's bytes, and zeros up to a multiple of 4 bytes. An outlier makes only the numbers of its
    own token and head less precise.
    """

    largest: float
    """The largest number that a byte can hold."""

    def row_format(self, spec: LayerSpec, dtype: str | torch.dtype) -> RowFormat:
        """Rows without groups, whatever the model's dtype."""
        return RowFormat(-(-spec.heads * (8 + spec.head_dim + spec.v_head_dim) // 4) * 4)

    def head_bytes(self, spec: LayerSpec, dtype: str | torch.dtype, heads: slice) -> HeadBytes:
        """Their scales, and their K and V."""
        first, count, start = heads.start, heads.stop - heads.start, 8 * spec.heads
        values = start + spec.heads * spec.head_dim
        return HeadBytes.of(
            [
                (4 * first, 4 * count),
                (4 * (spec.heads + first), 4 * count),
                (start + first * spec.head_dim, count * spec.head_dim),
                (values + first * spec.v_head_dim, count * spec.v_head_dim),
            ]
        )

    def encode(self, k: Tensor, v: Tensor) -> Tensor:
        """Quantised rows.

        Raises:
            NonFiniteError: K or V holds an infinity or NaN, which no scale can carry.
        """
        k_scale, k_bytes = self._quantise(k, "keys")
        v_scale, v_bytes = self._quantise(v, "values")
        parts = [k_scale.view(torch.uint8), v_scale.view(torch.uint8), k_bytes.flatten(1), v_bytes.flatten(1)]
        short = -sum(part.shape[1] for part in parts) % 4
        return torch.cat([*parts, k_bytes.new_zeros(k.shape[0], short)], dim=1).flatten()

    def decode(
        self, encoded: Tensor, spec: LayerSpec, dtype: str | torch.dtype, pieces: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """The numbers, by a multiplication for each, in float32."""
        heads = spec.heads
        rows = encoded.view(-1, self.row_format(spec, dtype).row_bytes)
        scales = rows[:, : 8 * heads].clone(memory_format=torch.contiguous_format).view(torch.float32)
        start, middle = 8 * heads, 8 * heads + heads * spec.head_dim
        end = middle + heads * spec.v_head_dim
        k = rows[:, start:middle].unflatten(1, (heads, spec.head_dim))
        v = rows[:, middle:end].unflatten(1, (heads, spec.v_head_dim))
        wanted = torch_dtype(dtype)
        k_scale, v_scale = scales.split(heads, dim=1)
        return self._numbers(k, k_scale[..., None]).to(wanted), self._numbers(v, v_scale[..., None]).to(wanted)

    @abstractmethod
    def _bytes(self, numbers: Tensor) -> Tensor:
        """The bytes (uint8) of float32 numbers, which are clamped to `largest`."""

    @abstractmethod
    def _numbers(self, stored: Tensor, scale: Tensor) -> Tensor:
        """The numbers of the bytes `stored` (uint8), times `scale`, in float32."""

    def _quantise(self, values: Tensor, what: str) -> tuple[Tensor, Tensor]:
        """Scales, float32 [n, heads], and bytes, uint8 [n, heads, dim]."""
        exact = values.float()
        largest = exact.abs().amax(dim=-1)
        if not bool(torch.isfinite(largest).all()):
            raise NonFiniteError(
                f"{what} hold an infinity or NaN, which codec {shown(self.name)} can't store; use codec 'exact'"
            )
        scale = largest / self.largest
        # The scale may have been rounded up so far that decoding the largest float32 would give infinity.
        scale = torch.where(torch.isinf(scale * self.largest), torch.nextafter(scale, torch.zeros_like(scale)), scale)
        divisor = torch.where(scale > 0, scale, torch.ones_like(scale))
        return scale.contiguous(), self._bytes(exact / divisor[..., None])
