"""The paper's ranking: tokens count as important whose keys and values are large after a low-pass filter along the chunk (section 3)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cachetune_rag.selection import names
from cachetune_rag.selection.base import ReusedChunk, SelectionContext, Selector

ALPHA = 0.5
"""Share of the frequencies that is kept, the lowest ones, as published."""


def frequency_scores(layers: Sequence[tuple[Tensor, Tensor]], alpha: float = ALPHA) -> Tensor:
    """The importance of a chunk's tokens, as it is stored.

    Per layer: real FFT of K and of V along tokens in float32, keep the floor(alpha * (N // 2 + 1)) lowest bins, inverse
    FFT with length N; score = (|K_low| + |V_low|) / 2 with norms over heads and channels, divided by the layer's sum
    over tokens. The mean over layers is returned.

    Args:
        layers: per layer, keys before rotation and values, each [tokens, kv_heads, head_dim].
        alpha: share of the bins that is kept, in [0, 1].

    Returns:
        float32 [tokens] on the layers' device.
    """
    total: Tensor | None = None
    for keys, values in layers:
        score = (low_pass_norm(keys, alpha) + low_pass_norm(values, alpha)) / 2
        share = score.sum()
        # With alpha = 0 all norms are 0, which must not be divided by. All tokens are then equally important.
        score = torch.where(share > 0, score / share.clamp_min(torch.finfo(torch.float32).tiny), score)
        total = score if total is None else total + score
    if total is None:
        raise ValueError("frequency_scores needs at least one layer, got none.")
    return total / len(layers)


def low_pass_norm(states: Tensor, alpha: float) -> Tensor:
    """Norm of each token's vector after the low-pass filter: [tokens, heads, dim] -> float32 [tokens].

    Of the tokens // 2 + 1 frequencies along the tokens, the floor(alpha * (tokens // 2 + 1)) lowest are kept.
    """
    tokens = states.shape[0]
    # Tokens are the last axis, because an FFT over a contiguous axis is several times faster.
    signal = states.float().flatten(1).T.contiguous()
    spectrum = torch.fft.rfft(signal, dim=1)
    spectrum[:, math.floor(alpha * (tokens // 2 + 1)) :] = 0
    return torch.linalg.vector_norm(torch.fft.irfft(spectrum, n=tokens, dim=1), dim=0)


class FrequencySelector(Selector):
    """The top floor(r * N) tokens of each chunk by the stored ranking, without any look at the query (section 3).

    Not in the paper: where a chunk's first tokens go on with a sentence that the chunk before began, they come before all others, in their order.
    """

    name = names.FREQUENCY
    offline = True
    revision = 5  # 4: a short rest of a cut sentence that stood in the chunk before as well was no continuation; 3: lines of code that are cut were no continuations; 2: nor were rows of tables; 1: the rest of a cut sentence had no place of its own

    def select(self, context: SelectionContext, ratio: float) -> Tensor:
        """See `Selector.select`. The top tokens are the last rows of a chunk's file, which then need not be read."""
        rests = {rest.start: len(rest) for _, rest in context.continuations}
        # NumPy, because torch takes longer for a few numbers, and there may be many chunks.
        picked = [c.start + _top(c, c.budget(ratio), rests.get(c.start, 0)) for c in context.chunks]
        return torch.from_numpy(np.concatenate([np.empty(0, np.int64), *picked]))


def _top(chunk: ReusedChunk, count: int, first: int) -> NDArray[np.int64]:
    """Numbers of the chunk's `count` most important tokens that can be chosen, if its `first` first ones come before all others."""
    order: NDArray[np.int64] = chunk.order.numpy()[: chunk.tokens - chunk.skipped]
    if not first:
        return order[len(order) - count :]
    begins = np.sort(order[order < first])[:count]
    others = order[order >= first]
    return np.concatenate([begins, others[len(others) - (count - len(begins)) :]])
