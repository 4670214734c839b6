"""Teacher forcing: the logits from which a model would choose each token of a continuation that is given."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from cachetune_rag.model import ModelAdapter


def rewind(cache: Cache, length: int) -> None:
    """Drop all tokens after the first `length`. After a forward that was stopped early, layers have different lengths, so each is cut."""
    for layer in cache.layers:
        if (beyond := layer.get_seq_length() - length) > 0:
            layer.crop(-beyond)


def teacher_forced(
    adapter: ModelAdapter, logits: Tensor, cache: Cache, target: Sequence[int], block: int = 128
) -> Iterator[Tensor]:
    """The logits from which each token of `target` would be chosen, if all tokens of `target` before it had been chosen.

    Args:
        adapter: the model; the caller holds its lock.
        logits: of the prompt's last token, [1, vocab].
        cache: of the prompt; target[:-1] is appended to it.
        target: token ids, at least one.
        block: the most tokens that one forward computes. It bounds the memory that logits take.

    Yields:
        Blocks of logits [tokens, vocab], which together have one row for each token of `target`.
    """
    yield logits
    ids = torch.tensor(list(target[:-1]), dtype=torch.int64, device=adapter.device)
    for part in ids.split(block) if len(ids) else ():
        yield adapter.forward(part, cache, keep=len(part))
