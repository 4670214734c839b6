"""The interface of a selector, and what it may look at."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class ReusedChunk:
    """A chunk whose KV comes from the store, as it stands in one prompt.

    Attributes:
        start: place of its first token in the prompt.
        order: int64 [tokens]; the offline ranking, least important token first (the row order of its file).
        scores: float32 [tokens]; the offline score of each token, in token order.
        deviations: float16 [tokens, 2 * sum over layers of kv_heads], as stored: how far the token's key and value moved
            from one lead-in to another, a column a head, keys before values, layer by layer. None where there was a single
            lead-in and nothing is known.
        skipped: the last `skipped` tokens of the ranking are recomputed whatever the selector says; their KV isn't read, so
            there is nothing to choose about them.
    """

    start: int
    order: Tensor
    scores: Tensor
    deviations: Tensor | None = None
    skipped: int = 0

    @property
    def tokens(self) -> int:
        """Number of its tokens."""
        return int(self.order.shape[0])

    def budget(self, ratio: float) -> int:
        """How many tokens of this chunk are left to choose, if `ratio` of all of it is to be recomputed."""
        return max(0, budget(ratio, self.tokens) - self.skipped)

    def places(self) -> Tensor:
        """Places in the prompt of the tokens that can be chosen, int64, ascending."""
        if not self.skipped:
            return torch.arange(self.start, self.start + self.tokens)
        return self.start + self.order[: self.tokens - self.skipped].sort().values


class SelectionContext(Protocol):
    """What a selector sees of a request."""

    @property
    def chunks(self) -> Sequence[ReusedChunk]:
        """The reused chunks, in prompt order."""

    @property
    def length(self) -> int:
        """Tokens of the whole prompt."""

    @property
    def num_layers(self) -> int:
        """Layers of the model."""

    @property
    def seed(self) -> int:
        """A number that depends on the prompt's token ids alone."""

    def observe_attention(self, num_layers: int, queries: int, observe: Callable[[int, Tensor], None]) -> None:
        """Run the tokens that are computed anyway (prefix, query, missed chunks) through the first layers.

        `observe(layer, weights)` gets the attention of the last `queries` prompt tokens over the reused KV,
        float32 [heads, queries, length].
        """

    def received_attention(self, num_layers: int, queries: int) -> Tensor:
        """What `observe_attention` shows, added up where that is cheaper: float32 [length], the attention that each token
        receives, averaged over heads and queries, summed over layers. On the model's device.
        """

    def expected_error(self, num_layers: int, queries: int) -> Tensor:
        """How much the error that each reused token is expected to have disturbs the query: float32 [length], on the
        model's device; the formula is in `Probe.expected_error`.

        Watched are the last `queries` tokens behind the last reused chunk. A chunk without deviations counts with the mean
        of the others'; where no chunk has any, this is `received_attention`.
        """

    def reused_states(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys at their places and values of a layer, [length, kv_heads, dim], as reuse has them: the rows of reused chunks
        hold what is stored, other rows may hold anything. Not to be written to.
        """

    def fresh_states(self, layer: int) -> tuple[Tensor, Tensor]:
        """The same, as full prefill has them: every token of the prompt is run through the layers before this one."""


class Selector(ABC):
    """Chooses online which tokens of the reused chunks are recomputed, one set for all layers."""

    name: ClassVar[str]
    """The name it is registered under."""
    uses_ratio: ClassVar[bool] = True
    """Whether the ratio of a request has any effect. Without one there is nothing to calibrate or to tune."""
    uses_deviations: ClassVar[bool] = False
    """Whether it looks at `ReusedChunk.deviations`."""
    offline: ClassVar[bool] = False
    """Whether it chooses by the stored ranking alone, so that the rows it chooses need not be read."""
    shift: ClassVar[float] = 0.0
    """How far the reused tokens of a chunk follow what its recomputed ones show, from 0 to 1 (`ChunkShift`)."""

    def layers(self, num_layers: int) -> int:
        """Through how many layers of a model of `num_layers`, from the first, it runs what is computed anyway to see what that
        attends to; 0 if it doesn't.
        """
        return 0

    @abstractmethod
    def select(self, context: SelectionContext, ratio: float) -> Tensor:
        """Places in the prompt of the tokens to recompute.

        Args:
            context: the request.
            ratio: share of the chunk tokens that is recomputed in all, in [0, 1]: those that a chunk's `skipped` counts, and
                those to choose (`ReusedChunk.budget`, or `total_budget` over all chunks).

        Returns:
            int64 [selected], places of chunk tokens that are not skipped, each at most once, in any order.
        """


def budget(ratio: float, tokens: int) -> int:
    """floor(ratio * tokens), not thrown off by the ratio's binary representation (0.29 * 100 is 29)."""
    return min(tokens, math.floor(ratio * tokens + 1e-9))


def top(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest of `scores` [n]; ties go to the smaller index."""
    return torch.sort(scores, descending=True, stable=True).indices[:count]


def top_set(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest of `scores` [n], on the host, ascending; ties go to the smaller index. `count` is from 1 to n.

    The set that `top` gives, without sorting everything.
    """
    # NumPy: for some ten thousand numbers, waking torch's threads takes longer than the work.
    numbers = scores.numpy()
    bound = np.partition(numbers, len(numbers) - count)[len(numbers) - count]
    chosen = numbers > bound
    chosen[np.flatnonzero(numbers == bound)[: count - int(chosen.sum())]] = True
    return torch.from_numpy(np.flatnonzero(chosen))


def top_places(scores: Tensor, places: Tensor, count: int) -> Tensor:
    """Those `count` of `places` [n] at which `scores` [length] is largest, both on the host; see `top_set`."""
    among = places.numpy()
    return torch.from_numpy(among[top_set(torch.from_numpy(scores.numpy()[among]), count).numpy()])


def total_budget(chunks: Sequence[ReusedChunk], ratio: float) -> int:
    """How many tokens are left to choose over all chunks, if `ratio` of their tokens is to be recomputed."""
    return max(0, budget(ratio, sum(c.tokens for c in chunks)) - sum(c.skipped for c in chunks))


def all_places(chunks: Sequence[ReusedChunk]) -> Tensor:
    """Places of every token of the chunks that can be chosen, int64, in prompt order."""
    return torch.from_numpy(np.concatenate([c.places().numpy() for c in chunks] or [np.empty(0, np.int64)]))
