"""Eight-bit floating point (e4m3) with a scale a head: as many bytes as int8, finer near zero and coarser at the top."""

from __future__ import annotations

import torch
from torch import Tensor

from .scaled import ScaledCodec

__all__ = ["Fp8Codec"]


class Fp8Codec(ScaledCodec):
    """A byte is a float8_e4m3fn: sign, 4 bits of exponent, 3 of mantissa, up to 448; no infinities."""

    name = "fp8"
    error = (
        "at most 6.3% of each value, or 1/400,000 of the largest of the same head and token if that is more, before "
        "rounding to the model's dtype"
    )
    largest = 448.0

    def _bytes(self, numbers: Tensor) -> Tensor:
        return numbers.clamp_(-self.largest, self.largest).to(torch.float8_e4m3fn).view(torch.uint8)

    def _numbers(self, stored: Tensor, scale: Tensor) -> Tensor:
        # Exponent and mantissa stand in a float16 as they do in the byte, under a bias of 15 for one of 7: that is a factor
        # of 2 ** 8, and no bit is lost. Torch's own conversion takes six times as long on a CPU.
        half = stored.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~0x4000)
        return half.view(torch.float16).to(torch.float32).mul_(scale * 256)
