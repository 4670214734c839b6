"""Low-rank adapters (LoRA, Hu et al. 2022) for all linear layers of a transformer's blocks, in PEFT's file format."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_BEFORE = "base_model.model."
"""What PEFT puts before the names of a model's parts."""
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoraLinear(nn.Module):
    """A linear layer that stays as it is, with a product of two small matrices beside it.

    Args:
        base: the layer. Its parameters are frozen.
        rank: columns of the first matrix.
        alpha: the product is multiplied by alpha / rank.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), alpha / rank
        made = {"device": base.weight.device, "dtype": torch.float32}
        self.down = nn.Parameter(torch.empty(rank, base.in_features, **made))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank, **made))
        nn.init.kaiming_uniform_(self.down, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output, and the product's."""
        return self.base(x) + (x @ self.down.T @ self.up.T) * self.scale


def add_lora(model: nn.Module, rank: int, alpha: float, seed: int = 0) -> dict[str, LoraLinear]:
    """Put an adapter that changes nothing yet beside every target layer of a model, freeze all else, and return the new layers by name.

    Raises:
        ValueError: the model has no such layers.
    """
    model.requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = {name: LoraLinear(layer, rank, alpha) for name, layer in _targets(model)}
    if not made:
        raise ValueError(f"{type(model).__name__} has no layers called {', '.join(TARGETS)}: name its own in TARGETS.")
    for name, layer in made.items():
        model.set_submodule(name, layer)
    return made


def save_adapter(layers: dict[str, LoraLinear], folder: Path, base: str) -> None:
    """Write adapters as PEFT reads them, in bfloat16.

    Args:
        layers: what `add_lora` returned.
        folder: where to. It is made if there is none.
        base: name of the model that they belong to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    first = next(iter(layers.values()))
    tensors = {}
    for name, layer in layers.items():
        for part, weight in (("lora_A", layer.down), ("lora_B", layer.up)):
            tensors[f"{_BEFORE}{name}.{part}.weight"] = weight.detach().to("cpu", torch.bfloat16).contiguous()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    rank = len(first.down)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": first.scale * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({name.rsplit(".", 1)[-1] for name in layers}),
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


@torch.no_grad()
def merge(model: nn.Module, folder: Path) -> None:
    """Add adapters from a folder to the weights of their model, which then is what it was with them beside it.

    Raises:
        ValueError: the adapters don't belong to this model, or are of another sort.
    """
    config = json.loads((folder / CONFIG).read_text())
    tensors = load_file(folder / WEIGHTS)
    plain = {"peft_type": "LORA", "bias": "none"}
    odd = [f"{name} {config.get(name)!r}" for name, wanted in plain.items() if config.get(name) != wanted]
    odd += [name for name in ("use_dora", "use_rslora", "modules_to_save") if config.get(name)]
    if odd:
        raise ValueError(f"{folder} has adapters with {', '.join(odd)}: only plain LoRA can be merged here.")
    scale = config["lora_alpha"] / config["r"]
    layers = dict(_targets(model))
    for name in sorted({key.removeprefix(_BEFORE).rsplit(".lora_", 1)[0] for key in tensors}):
        if name not in layers:
            raise ValueError(
                f"{folder} has an adapter for {name}, which this model has no layer for: use the model that it belongs to."
            )
        weight = layers[name].weight
        down, up = (
            tensors[f"{_BEFORE}{name}.{part}.weight"].to(weight.device, torch.float32) for part in ("lora_A", "lora_B")
        )
        if (len(up), down.shape[1]) != tuple(weight.shape):
            raise ValueError(
                f"{folder} has an adapter of {len(up)} x {down.shape[1]} for {name}, which has {tuple(weight.shape)}: use the model that it belongs to."
            )
        weight.copy_((weight.float() + scale * (up @ down)).to(weight.dtype))


def _targets(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for name, layer in model.named_modules():
        if name.rsplit(".", 1)[-1] in TARGETS and isinstance(layer, nn.Linear):
            yield name, layer
