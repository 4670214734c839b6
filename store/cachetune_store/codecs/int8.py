"""Eight-bit integers with a scale a head: half the bytes of 16-bit KV, a quarter of 32-bit."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import NonFiniteError
from ..layout import LayerSpec, torch_dtype
from .base import Codec

__all__ = ["Int8Codec"]

_STEPS = 127


class Int8Codec(Codec):
    """Symmetric, one float32 scale per token and head, for K and V each.

    A row is: K's scales, V's scales, K's integers, V's integers, zeros up to a multiple of 4 bytes. An outlier costs
    precision only in its own head of its own token.
    """

    name = "int8"
    error = "at most 0.4% of the largest value of the same head and token, before rounding to the model's dtype"

    def row_bytes(self, spec: LayerSpec, dtype: str | torch.dtype) -> int:
        """Bytes of one row; the model's dtype doesn't matter."""
        return -(-spec.heads * (8 + spec.head_dim + spec.v_head_dim) // 4) * 4

    def encode(self, k: Tensor, v: Tensor) -> Tensor:
        """Quantised rows.

        Raises:
            NonFiniteError: K or V holds an infinity or NaN, which no scale can carry.
        """
        k_scale, k_steps = _quantise(k, "keys")
        v_scale, v_steps = _quantise(v, "values")
        parts = [
            k_scale.view(torch.uint8),
            v_scale.view(torch.uint8),
            k_steps.flatten(1).view(torch.uint8),
            v_steps.flatten(1).view(torch.uint8),
        ]
        short = -sum(part.shape[1] for part in parts) % 4
        return torch.cat([*parts, parts[0].new_zeros(k.shape[0], short)], dim=1)

    def decode(self, rows: Tensor, spec: LayerSpec, dtype: str | torch.dtype) -> tuple[Tensor, Tensor]:
        """Numbers again: one multiplication for K and one for V."""
        heads = spec.heads
        scales = rows[:, : 8 * heads].clone(memory_format=torch.contiguous_format).view(torch.float32)
        start, middle = 8 * heads, 8 * heads + heads * spec.head_dim
        end = middle + heads * spec.v_head_dim
        k = rows[:, start:middle].view(torch.int8).unflatten(1, (heads, spec.head_dim))
        v = rows[:, middle:end].view(torch.int8).unflatten(1, (heads, spec.v_head_dim))
        wanted = torch_dtype(dtype)
        return (k * scales[:, :heads, None]).to(wanted), (v * scales[:, heads:, None]).to(wanted)


def _quantise(values: Tensor, what: str) -> tuple[Tensor, Tensor]:
    """Scales, float32 [n, heads], and integers, int8 [n, heads, dim]."""
    exact = values.float()
    largest = exact.abs().amax(dim=-1)
    if not bool(torch.isfinite(largest).all()):
        raise NonFiniteError(f"{what} hold an infinity or NaN, which codec 'int8' can't store; use codec 'exact'")
    scale = largest / _STEPS
    # The quotient may round up so far that the largest float32 would come back as infinity.
    scale = torch.where(torch.isinf(scale * _STEPS), torch.nextafter(scale, torch.zeros_like(scale)), scale)
    divisor = torch.where(scale > 0, scale, torch.ones_like(scale))
    steps = (exact / divisor[..., None]).round_().clamp_(-_STEPS, _STEPS).to(torch.int8)
    return scale.contiguous(), steps
