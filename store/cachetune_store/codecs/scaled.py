"""What the codecs with a byte a number and a scale a head have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import NonFiniteError
from ..layout import LayerSpec, RowFormat, torch_dtype
from ..printing import shown
from .base import Codec

__all__ = ["ScaledCodec"]


class ScaledCodec(Codec):
    """One float32 scale per token and head, for K and V each, chosen so that the head's largest number just fits.

    A row is: K's scales, V's scales, K's bytes, V's bytes, zeros up to a multiple of 4 bytes. An outlier costs precision
    only in its own head of its own token.
    """

    largest: float
    """The largest number that a byte can say."""

    def row_format(self, spec: LayerSpec, dtype: str | torch.dtype) -> RowFormat:
        """Bytes of one row; the model's dtype doesn't matter."""
        return RowFormat(-(-spec.heads * (8 + spec.head_dim + spec.v_head_dim) // 4) * 4)

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
        """Numbers again: one multiplication each, in float32."""
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
        """Bytes (uint8) of float32 numbers of at most `largest`, to which they may be clamped."""

    @abstractmethod
    def _numbers(self, stored: Tensor, scale: Tensor) -> Tensor:
        """What `stored` (uint8) says, times `scale`, in float32."""

    def _quantise(self, values: Tensor, what: str) -> tuple[Tensor, Tensor]:
        """Scales, float32 [n, heads], and bytes, uint8 [n, heads, dim]."""
        exact = values.float()
        largest = exact.abs().amax(dim=-1)
        if not bool(torch.isfinite(largest).all()):
            raise NonFiniteError(
                f"{what} hold an infinity or NaN, which codec {shown(self.name)} can't store; use codec 'exact'"
            )
        scale = largest / self.largest
        # The quotient may round up so far that the largest float32 would come back as infinity.
        scale = torch.where(torch.isinf(scale * self.largest), torch.nextafter(scale, torch.zeros_like(scale)), scale)
        divisor = torch.where(scale > 0, scale, torch.ones_like(scale))
        return scale.contiguous(), self._bytes(exact / divisor[..., None])
