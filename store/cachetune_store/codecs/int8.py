"""Eight-bit integers with a scale for each head: half the bytes of 16-bit KV, a quarter of those of 32-bit KV."""

from __future__ import annotations

import torch
from torch import Tensor

from .scaled import ScaledCodec

__all__ = ["Int8Codec"]


class Int8Codec(ScaledCodec):
    """Each number is an int from -127 to 127."""

    name = "int8"
    error = "at most 0.4% of the largest value of the same head and token, before rounding to the model's dtype"
    largest = 127.0

    def _bytes(self, numbers: Tensor) -> Tensor:
        return numbers.round_().clamp_(-self.largest, self.largest).to(torch.int8).view(torch.uint8)

    def _numbers(self, stored: Tensor, scale: Tensor) -> Tensor:
        return (
            stored.view(torch.int8).to(torch.float32).mul_(scale)
        )  # a product of int8 and float32 takes far longer on a CPU
