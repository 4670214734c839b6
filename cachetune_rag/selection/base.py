"""What a selector is, and what it sees of a request."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cachetune_rag.selection.bound import RatioFinder
from cachetune_rag.selection.choice import Choice


@dataclass(frozen=True)
class ReusedChunk:
    """A chunk whose KV comes from the store, as it stands in one prompt.

    Attributes:
        start: place of its first token in the prompt.
        order: int64 [tokens]; the ranking, with the least important token first. Rows in the chunk's file have this order.
        scores: float32 [tokens]; each token's importance, in token order, by which it was ranked.
        read_deviations: gives `deviations`; None for a chunk with a single lead-in. Of a chunk on disk it may have to wait for them.
        skipped: the rows of the last `skipped` tokens of the ranking are not read. These tokens are recomputed in any case, so a
            selector doesn't choose among them.
    """

    start: int
    order: Tensor
    scores: Tensor
    read_deviations: Callable[[], Tensor | None] | None = None
    skipped: int = 0

    @cached_property
    def deviations(self) -> Tensor | None:
        """Float16 [tokens, 2 * sum over layers of kv_heads]; how far the token's keys and values were apart behind different lead-ins. There is
        one column for each head, layer by layer, keys before values. None for a chunk with a single lead-in.
        """
        return None if self.read_deviations is None else self.read_deviations()

    @property
    def tokens(self) -> int:
        """Number of its tokens."""
        return int(self.order.shape[0])

    def budget(self, ratio: float) -> int:
        """How many tokens of this chunk a selector chooses if a share `ratio` of the chunk is to be recomputed."""
        return max(0, budget(ratio, self.tokens) - self.skipped)

    def places(self) -> Tensor:
        """Places in the prompt of the tokens that can be chosen: int64, ascending."""
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

    @property
    def ids(self) -> NDArray[np.int64]:
        """The prompt's token ids: [length]."""

    @property
    def sentences(self) -> NDArray[np.int64]:
        """The number of the sentence that each token of a chunk belongs to, ascending from 0; -1 for tokens of no chunk: [length]. -1 for all where
        token ids spell no text."""

    @property
    def asked_from(self) -> int:
        """The place from which on the prompt's last turn stands; 0 where no earlier one stands behind the chunks."""

    @property
    def continuations(self) -> Sequence[tuple[range, range]]:
        """Where a sentence begins in one chunk of the prompt and goes on in the next: the places of its beginning, and those of the
        rest. The rest was stored without the beginning, whatever a score says of it (see `selection/continued.py`)."""

    def observe_attention(
        self, num_layers: int, queries: int, observe: Callable[[int, Tensor], None], whole: bool = False
    ) -> None:
        """Run tokens that are computed anyway (prefix, query) through the first layers.

        For each layer, `observe(layer, weights)` is called with the attention of the prompt's last `queries` tokens:
        float32 [heads, queries, length].

        Args:
            num_layers, queries, observe: see above.
            whole: run all of them. Otherwise new passages behind the first reused chunk (missed chunks, say) are left out, as if they weren't in
                the prompt.
        """

    def received_attention(self, num_layers: int, queries: int, whole: bool = False) -> Tensor:
        """The attention that each token receives in `observe_attention`: averaged over heads and queries, summed over layers.

        It is added up on the model's device, where the result stays: float32 [length].
        """

    def expected_error(
        self, num_layers: int, queries: int, shortlist: tuple[int, int] | None = None, whole: bool = False
    ) -> Tensor:
        """How much the expected error of each reused token disturbs the query: float32 [length], on the model's device.

        The formula is in `Probe.expected_error`; here it is averaged over the watched tokens, the last `queries` behind the last reused chunk. A chunk without
        deviations is given the mean of the others' deviations. If no chunk has any, this is `received_attention`.

        Args:
            num_layers, queries, whole: see `observe_attention`.
            shortlist: (layers, tokens): behind so many of the first layers, only so many chunk tokens, those with the largest scores so far, are
                looked at. The rows of the others are hidden from the computed tokens, and they keep the scores that they have. Not used where no
                chunk has deviations. None: every layer looks at all tokens.
        """

    def next_token(self, num_layers: int) -> Tensor:
        """The logits of the prompt's next token if nothing is recomputed: [vocab], on the model's device. It takes a forward of one token where the
        first `num_layers` layers, which a probe has run through before, are all; and of those that are computed anyway where they aren't.
        """

    def reused_states(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys (rotated to their places in the prompt) and values of a layer, each [length, kv_heads, dim], as reuse would use them.

        Rows of reused chunks are those from the store; other rows may hold anything. Don't write to them.
        """

    def fresh_states(self, layer: int) -> tuple[Tensor, Tensor]:
        """As `reused_states`, but as full prefill computes them: the whole prompt is run through the layers before this one."""


class Selector(ABC):
    """Chooses, while a request runs, which tokens of the reused chunks are recomputed. The choice is the same for all layers."""

    name: ClassVar[str]
    """The name it is registered under."""
    uses_ratio: ClassVar[bool] = True
    """Whether a request's ratio has any effect. If not, there is nothing to calibrate or to tune."""
    uses_deviations: ClassVar[bool] = False
    """Whether it uses `ReusedChunk.deviations`: they are then read from disk before it asks for them."""
    offline: ClassVar[bool] = False
    """Whether it chooses by the stored ranking alone. The rows that it chooses need not be read then."""
    shift: ClassVar[float] = 0.0
    """How much of the change that a chunk's recomputed tokens show is carried over to its reused ones, from 0 to 1 (`ChunkShift`)."""

    revision: ClassVar[int] = 1
    """Raised when its choice or its scores change, so that what was calibrated before is known to be of another choice: also where only what it is told of a prompt changes,
    such as its sentences and continuations (`tests/selection/test_revisions.py`)."""

    def layers(self, num_layers: int) -> int:
        """How many of a model's `num_layers` layers its probe runs through; 0 if it has no probe."""
        return 0

    def looks_at(self, num_layers: int) -> int:
        """How many of a model's `num_layers` layers have to have their stored rows read before it can choose: nothing is recomputed until then. 0 if it looks at none; the
        layers of its probe, if a selector says nothing else. It needn't look where all tokens are chosen, or none."""
        return self.layers(num_layers)

    def share(self, ratio: float) -> float:
        """The share of the chunk tokens that it recomputes where `ratio` is asked for."""
        return ratio if self.uses_ratio else 0.0

    def shortlist_after(self, num_layers: int) -> int:
        """Behind how many of a model's `num_layers` layers its probe may go on with a shortlist (`SelectionContext.expected_error`); 0: never."""
        return 0

    predicts: ClassVar[bool] = False
    """Whether it scores tokens by how much they disturb the query, so that the error which a ratio leaves can be told before it is taken."""

    def choose(self, context: SelectionContext, ratio: float, finder: RatioFinder | None = None) -> Choice:
        """The tokens to recompute, and what is known of the error that this leaves.

        Args:
            context, ratio: see `select`.
            finder: finds the ratio, in place of `ratio`. For selectors that predict.
        """
        if finder is not None:
            raise ValueError(f"selector {self.name} predicts nothing")
        return Choice(self.select(context, ratio), ratio)

    @abstractmethod
    def select(self, context: SelectionContext, ratio: float) -> Tensor:
        """Places in the prompt of the tokens to recompute.

        Args:
            context: the request.
            ratio: share of the chunk tokens that is recomputed, in [0, 1]. It includes the tokens that are skipped, so `ReusedChunk.budget`
                and `total_budget` say how many to choose.

        Returns:
            int64 [selected]: places of chunk tokens that are not skipped, each at most once, in any order.
        """


def budget(ratio: float, tokens: int) -> int:
    """floor(ratio * tokens), whatever rounding does to the product: 0.29 of 100 tokens are 29."""
    return min(tokens, math.floor(ratio * tokens + 1e-9))


def top(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest of `scores` [n]; ties go to the smaller index."""
    return torch.sort(scores, descending=True, stable=True).indices[:count]


def top_set(scores: Tensor, count: int) -> Tensor:
    """As `top`, but the indices are ascending, and it is faster because not everything is sorted. `count` is from 1 to n.

    `scores` are on the host.
    """
    # NumPy, because for some ten thousand numbers torch takes longer to wake its threads than the work takes.
    numbers = scores.numpy()
    bound = np.partition(numbers, len(numbers) - count)[len(numbers) - count]
    chosen = numbers > bound
    chosen[np.flatnonzero(numbers == bound)[: count - int(chosen.sum())]] = True
    return torch.from_numpy(np.flatnonzero(chosen))


def top_places(scores: Tensor, places: Tensor, count: int) -> Tensor:
    """The `count` of `places` [n] at which `scores` [length] is largest. Both are on the host; see `top_set`."""
    among = places.numpy()
    return torch.from_numpy(among[top_set(torch.from_numpy(scores.numpy()[among]), count).numpy()])


def total_budget(chunks: Sequence[ReusedChunk], ratio: float) -> int:
    """How many tokens a selector chooses in all chunks together if a share `ratio` of their tokens is to be recomputed."""
    return max(0, budget(ratio, sum(c.tokens for c in chunks)) - sum(c.skipped for c in chunks))


def all_places(chunks: Sequence[ReusedChunk]) -> Tensor:
    """Places of all tokens that can be chosen: int64, chunk by chunk, ascending in each."""
    return torch.from_numpy(np.concatenate([c.places().numpy() for c in chunks] or [np.empty(0, np.int64)]))
