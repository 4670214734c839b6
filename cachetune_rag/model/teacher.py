"""Teacher forcing: the logits of given tokens behind a prompt, and forwards that give way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from cachetune_rag.model.family.taps import Hooks
from cachetune_rag.model.plain.attention import StopForward

if TYPE_CHECKING:
    from cachetune_rag.model.adapter import ModelAdapter


def rewind(cache: Cache, length: int) -> None:
    """Forget what came after the first `length` tokens; also where a forward was cut off and layers differ."""
    for layer in cache.layers:
        if (beyond := layer.get_seq_length() - length) > 0:
            layer.crop(-beyond)


def teacher_forced(
    adapter: ModelAdapter, logits: Tensor, cache: Cache, target: Sequence[int], block: int = 128
) -> Iterator[Tensor]:
    """The logits from which each token of `target` would be chosen, whatever the model would choose itself.

    Args:
        adapter: the model; the caller holds its lock.
        logits: of the prompt's last token, [1, vocab].
        cache: of the prompt; it grows by target[:-1].
        target: token ids, at least one.
        block: tokens of a forward; bounds the memory for logits.

    Yields:
        Logits [at most block + 1, vocab], for all tokens of `target` together.
    """
    yield logits
    ids = torch.tensor(list(target[:-1]), dtype=torch.int64, device=adapter.device)
    for part in ids.split(block) if len(ids) else ():
        yield adapter.forward(part, cache, keep=len(part))


@contextmanager
def interruptible(attentions: Sequence[nn.Module], device: torch.device, stop: Callable[[], bool]) -> Iterator[None]:
    """While the context is open, a forward ends with `StopForward` before the first layer at which `stop()` is true.

    Hooks see every forward of the model, so the caller holds the lock under which the model runs.
    """

    def check(*_: object) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # the host is layers ahead, and what it has launched can't be taken back
        if hooks.live and stop():
            raise StopForward

    hooks = Hooks()
    try:
        hooks.handles += [attention.register_forward_pre_hook(check) for attention in attentions]
        yield
    finally:
        hooks.live = False
        hooks.remove()
