"""CacheTune's ranking: tokens whose keys and values are largest after a low-pass along the chunk (section 3)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cachetune_rag.selection import names
from cachetune_rag.selection.base import SelectionContext, Selector

ALPHA = 0.5
"""Share of the lowest frequencies that is kept, as published."""


def frequency_scores(layers: Sequence[tuple[Tensor, Tensor]], alpha: float = ALPHA) -> Tensor:
    """Offline importance of a chunk's tokens.

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
        # With alpha = 0 nothing passes; all tokens are then equally (un)important.
        score = torch.where(share > 0, score / share.clamp_min(torch.finfo(torch.float32).tiny), score)
        total = score if total is None else total + score
    if total is None:
        raise ValueError("frequency_scores needs at least one layer, got none.")
    return total / len(layers)


def low_pass_norm(states: Tensor, alpha: float) -> Tensor:
    """Norm of each token's low-passed vector: [tokens, heads, dim] -> float32 [tokens].

    Of the tokens // 2 + 1 frequencies along the tokens, the floor(alpha * (tokens // 2 + 1)) lowest are kept.
    """
    tokens = states.shape[0]
    # Channel-major, because an FFT over a contiguous axis is several times faster.
    signal = states.float().flatten(1).T.contiguous()
    spectrum = torch.fft.rfft(signal, dim=1)
    spectrum[:, math.floor(alpha * (tokens // 2 + 1)) :] = 0
    return torch.linalg.vector_norm(torch.fft.irfft(spectrum, n=tokens, dim=1), dim=0)


class FrequencySelector(Selector):
    """The top floor(r * N) tokens of each chunk by offline score: nothing is looked at online (section 3)."""

    name = names.FREQUENCY
    offline = True

    def select(self, context: SelectionContext, ratio: float) -> Tensor:
        """See `Selector.select`. The last rows of a chunk's file are its top tokens, so they need not even be read."""
        ends = [(c, c.tokens - c.skipped) for c in context.chunks]
        # NumPy: torch takes the host longer for a few numbers, and there are many chunks.
        picked = [c.start + c.order.numpy()[end - c.budget(ratio) : end] for c, end in ends]
        return torch.from_numpy(np.concatenate([np.empty(0, np.int64), *picked]))
