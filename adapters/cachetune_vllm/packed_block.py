"""Mixtures of experts that are computed by vLLM's own modules, for experts that vLLM keeps in a form of its own.

vLLM's experts choose by the router's logits themselves, so not the experts alone but the whole block of a layer is vLLM's: its router, its
experts, and experts that every token shares.

vLLM finds such layers by a "forward context", of which a process has one at a time. So a block must not be called while vLLM runs a forward:
models with such blocks take turns with vLLM's steps (`turns.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

_WITH_SCORES = {"GptOssMLP"}
"""Blocks of transformers that also return their router's scores."""


def _nothing(_amount: int) -> None:
    pass


class PackedBlock(nn.Module):
    """A layer's mixture of experts, computed by vLLM's block.

    Args:
        block: vLLM's.
        replaced: the block of transformers that it stands for.
        vllm_config: vLLM's configuration.
        turn: a context that is entered around each call (`cpu_turn.py`).

    Attributes:
        spend: told how many rows were computed, after each call.
    """

    def __init__(self, block: nn.Module, replaced: nn.Module, vllm_config: Any, turn: AbstractContextManager[Any]):
        super().__init__()
        self._theirs: Callable[[Tensor], Tensor] = lambda rows: block(rows)  # not a child: its parameters are vLLM's
        self._config, self._turn = vllm_config, turn
        self._scores = type(replaced).__name__ in _WITH_SCORES
        self.spend: Callable[[int], None] = _nothing

    def forward(self, states: Tensor) -> Any:
        """[..., width] -> the same shape, and whatever else transformers' block returns."""
        from vllm.forward_context import set_forward_context

        rows = states.reshape(-1, states.shape[-1]).clone()  # experts may write their result there
        with self._turn, set_forward_context(None, self._config, num_tokens=rows.shape[0], skip_compiled=True):
            result = self._theirs(rows).view(states.shape)
        self.spend(rows.shape[0])
        return (result, None) if self._scores else result


def has_experts(module: nn.Module) -> bool:
    """Whether a vLLM module holds experts."""
    return any(type(part).__name__ in ("FusedMoE", "MoERunner") for part in module.modules())
