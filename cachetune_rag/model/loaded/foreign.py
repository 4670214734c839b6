"""Layers whose weights are kept, and multiplied by, outside of the model: for example a server's quantised layers."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn


class ForeignLinear(nn.Module, ABC):
    """A linear layer without parameters, whose product is computed elsewhere.

    Args:
        in_features, out_features: its shape, as `torch.nn.Linear` has it.

    The weights of a model with such layers can't all be read, so an engine on it has to be told their fingerprint, and notices changes
    only in the weights that are there.
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features

    @property
    @abstractmethod
    def weight(self) -> Tensor:
        """The matrix [out_features, in_features] that it multiplies by. It may be made anew at each use, which may be slow."""

    @abstractmethod
    def forward(self, states: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""

    def extra_repr(self) -> str:
        """What `repr` shows of the layer."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


def foreign_layers(model: nn.Module) -> list[str]:
    """The names of the layers whose weights are outside of the model."""
    return [name for name, module in model.named_modules() if isinstance(module, ForeignLinear)]
