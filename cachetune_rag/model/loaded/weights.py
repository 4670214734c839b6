"""Finds weights that are NaN or infinite when a model is opened, before they spoil answers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cachetune_rag.errors import UnsupportedModelError

_BLOCK = 1 << 24
"""Elements that are checked together, which bounds the temporary memory."""
_PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@torch.no_grad()
def check_finite(model: nn.Module) -> None:
    """Refuse a model with NaN or infinity in a parameter; each is read once.

    Raises:
        UnsupportedModelError: names the parameter.
    """
    bounds = {name: bound for name, parameter in model.named_parameters() if (bound := _bounds(parameter)) is not None}
    if not bounds:
        return
    # All at once: asking a device for one number waits for it.
    finite = torch.stack(list(bounds.values())).isfinite().all(dim=1).tolist()
    for name, fine in zip(bounds, finite, strict=True):
        if not fine:
            raise UnsupportedModelError(_told(model, name, model.get_parameter(name)))


def _bounds(parameter: Tensor) -> Tensor | None:
    """The least and the largest value, float32 [2]; NaN if there is one. None where values aren't stored as plain floats."""
    if parameter.layout != torch.strided or parameter.numel() == 0 or not parameter.is_floating_point():
        return None
    if parameter.dtype in _PLAIN:
        return (
            torch.stack(parameter.aminmax()).float() if parameter.dtype != torch.float64 else _bounds(parameter.float())
        )
    flat = parameter.reshape(-1)  # float8 kinds know no order
    parts = [torch.stack(flat[at : at + _BLOCK].float().aminmax()) for at in range(0, flat.numel(), _BLOCK)]
    return torch.stack([torch.stack(parts)[:, 0].amin(), torch.stack(parts)[:, 1].amax()])


def _told(model: nn.Module, name: str, parameter: Tensor) -> str:
    wrong = ~parameter.float().isfinite()
    place = wrong.nonzero()[0].tolist()
    return (
        f"{type(model).__name__} has weights that are no numbers: {int(wrong.sum())} of {parameter.numel()} values of {name} are NaN or "
        f"infinite, the first at {place}. Its answers would be empty or random: load the weights again, or in a dtype that holds them "
        "(float16 ends at 65504)."
    )
