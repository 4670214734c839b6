"""Finding the model that a vLLM worker loaded.

vLLM hands a connector the attention layers, but not the model around them. A worker extension could reach it, but would need an
option of its own on the server's command line, so the module tree that holds these layers is looked up among all live objects once,
at the start.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from typing import Any

from torch import nn

from cachetune_rag.errors import UnsupportedModelError


def attention_layers(by_name: Mapping[str, Any]) -> list[nn.Module]:
    """The decoder's attention layers, in the model's order.

    Args:
        by_name: the layers that vLLM registered for the model, by their names.

    Raises:
        UnsupportedModelError: a layer keeps something else than keys and values of a decoder.
    """
    found: dict[int, nn.Module] = {}
    for name, layer in by_name.items():
        if not hasattr(layer, "kv_cache"):
            continue
        number = _layer_number(name)
        if number is None or number in found or not hasattr(getattr(layer, "impl", None), "do_kv_cache_update"):
            raise UnsupportedModelError(
                f"the layer {name} ({type(layer).__name__}) of this model keeps a state that stored chunks don't have."
            )
        found[number] = layer
    if not found or sorted(found) != list(range(len(found))):
        raise UnsupportedModelError("this worker doesn't hold all attention layers of the model.")
    return [found[number] for number in sorted(found)]


def model_around(layers: list[nn.Module]) -> nn.Module:
    """The outermost module that holds these layers.

    Raises:
        UnsupportedModelError: there is none.
    """
    wanted = set(map(id, layers))
    largest: nn.Module | None = None
    size = 0
    for candidate in gc.get_objects():
        # By its type: `isinstance` also evaluates proxy objects, and some of them answer with a warning or an error.
        if not issubclass(type(candidate), nn.Module) or not hasattr(candidate, "compute_logits"):
            continue
        inside = [id(module) for module in candidate.modules()]
        if len(inside) > size and wanted <= set(inside):
            largest, size = candidate, len(inside)
    if largest is None:
        raise UnsupportedModelError("the model of this worker can't be found among its objects.")
    return largest


def _layer_number(name: str) -> int | None:
    """The number of a layer by its name, such as "model.layers.3.self_attn.attn"."""
    numbers = [part for part in name.split(".") if part.isdigit()]
    return int(numbers[0]) if len(numbers) == 1 else None
