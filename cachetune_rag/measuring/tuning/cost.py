"""What a request should take, calculated from two measured times. It says where the search begins, and gives the roofline in plots."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CostModel:
    """Times of one prompt on one tier.

    Attributes:
        move: seconds to move the KV of one token of one layer from the tier to its place in the prompt (the paper's ti).
        compute: seconds to compute one token of one layer (the paper's tc).
        layers: how many layers the model has.
        chunk_tokens: how many tokens the prompt's chunks have.
        other_tokens: tokens of prefix and query, which are always computed.
    """

    move: float
    compute: float
    layers: int
    chunk_tokens: int
    other_tokens: int

    @property
    def balance(self) -> float:
        """The ratio r at which computing takes as long as moving: ti / (tc + ti) (the paper's hardware-aware ratio).

        A share r of the tokens is computed while the others are moved, so r * tc = (1 - r) * ti.
        """
        total = self.move + self.compute
        return self.move / total if total > 0 else 0.0

    def compute_seconds(self, ratio: float) -> float:
        """Seconds to compute a share `ratio` of the chunk tokens, and all other tokens."""
        return self.compute * self.layers * (ratio * self.chunk_tokens + self.other_tokens)

    def move_seconds(self, skipped: float) -> float:
        """Seconds to move all rows but a share `skipped`."""
        return self.move * self.layers * (1 - skipped) * self.chunk_tokens

    def roofline(self, ratio: float, skipped: float) -> float:
        """The least possible seconds: the longer of moving and computing, which at best happen at the same time."""
        return max(self.compute_seconds(ratio), self.move_seconds(skipped))
