"""What a request costs by arithmetic: where the search begins, and the roofline that measured points are held against."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CostModel:
    """Times of one prompt on one tier.

    Attributes:
        move: seconds to move one token of one layer from the tier to its place in the prompt (the paper's ti).
        compute: seconds to compute one token of one layer (the paper's tc).
        layers: layers of the model.
        chunk_tokens: tokens of the prompt's chunks.
        other_tokens: prefix and query, which are always computed.
    """

    move: float
    compute: float
    layers: int
    chunk_tokens: int
    other_tokens: int

    @property
    def balance(self) -> float:
        """The ratio at which moving the rest takes as long as computing it: ti / (tc + ti) (CacheTune, hardware-aware ratio).

        With r of the tokens computed and the others moved meanwhile, r * tc = (1 - r) * ti there.
        """
        total = self.move + self.compute
        return self.move / total if total > 0 else 0.0

    def compute_seconds(self, ratio: float) -> float:
        """Computing `ratio` of the chunk tokens, and what is always computed."""
        return self.compute * self.layers * (ratio * self.chunk_tokens + self.other_tokens)

    def move_seconds(self, skipped: float) -> float:
        """Moving all rows but the skipped ones."""
        return self.move * self.layers * (1 - skipped) * self.chunk_tokens

    def roofline(self, ratio: float, skipped: float) -> float:
        """The least time there can be where moving and computing overlap in full: the longer of the two."""
        return max(self.compute_seconds(ratio), self.move_seconds(skipped))
