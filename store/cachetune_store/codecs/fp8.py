"""Eight-bit floating point (e4m3), with a scale for each head. As large as int8, but finer for small numbers and coarser for large ones."""

from __future__ import annotations

import torch
from torch import Tensor

from .scaled import ScaledCodec

__all__ = ["Fp8Codec"]


class Fp8Codec(ScaledCodec):
    """Each number is a float8_e4m3fn: a sign, 4 bits of exponent and 3 of mantissa. The largest is 448, and there are no infinities."""

    name = "fp8"
    error = (
        "at most 6.3% of each value, or 1/400,000 of the largest of the same head and token if that is more, before "
        "rounding to the model's dtype"
    )
    largest = 448.0

    def _bytes(self, numbers: Tensor) -> Tensor:
        return numbers.clamp_(-self.largest, self.largest).to(torch.float8_e4m3fn).view(torch.uint8)

    def _numbers(self, stored: Tensor, scale: Tensor) -> Tensor:
        # A float16 has exponent and mantissa in the same order as the byte. Its exponent's bias is 15 instead of 7, which is a factor
        # of 2 ** 8. So no bit is lost. torch's own conversion takes six times as long on a CPU.
        half = stored.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~0x4000)
        return half.view(torch.float16).to(torch.float32).mul_(scale * 256)
