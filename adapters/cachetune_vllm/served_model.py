"""A model of transformers over the weights that vLLM has loaded: one copy of them, run by both.

The engine runs transformers' code, since that is what chunks are precomputed with. Its parameters are views of vLLM's tensors
wherever those hold the weights as the checkpoint has them; a linear layer whose weights vLLM keeps in another form calls vLLM's
module instead (`packed.py`). Both may occur in one model. What fits neither is refused with the reason.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy, deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cachetune_rag.errors import UnsupportedModelError
from cachetune_vllm.packed import PackedLinear, SharedProduct, run_of, run_of_head, take_turns
from cachetune_vllm.weights import VLLMWeights


@dataclass(frozen=True)
class ServedModel:
    """A model of transformers that shares vLLM's weights.

    Attributes:
        model: the model, in eval mode.
        form: "dense" where every parameter is a view of vLLM's tensors; "packed" where some layers call vLLM's modules.
        packed: the names of the layers that call vLLM's modules.
        fingerprint: identifies the weights; None where it has to be given to the engine (see `served_fingerprint`), or where the
            engine finds it itself, as it does for dense models.
    """

    model: Any
    form: Literal["dense", "packed"]
    packed: tuple[str, ...]
    fingerprint: str | None = None


def served_model(vllm_model: nn.Module, hf_config: Any, dtype: torch.dtype, device: torch.device) -> ServedModel:
    """Make transformers' model over the weights of vLLM's.

    Args:
        vllm_model: the model as vLLM loaded it.
        hf_config: its configuration, as transformers reads it from the checkpoint.
        dtype: what it computes in.
        device: where its weights are.

    Raises:
        UnsupportedModelError: names the layer whose weights can't be shared, and the reason.
    """
    weights = VLLMWeights(vllm_model)
    weights.check_parallel()
    with _uncompiled(vllm_model):
        model = skeleton(hf_config, dtype)
    turn = take_turns(vllm_model) if device.type == "cpu" else nullcontext()
    packed = _Sharing(model, weights, dtype, device, turn).share()
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    model.requires_grad_(False)
    _check_shared(model, weights)
    return ServedModel(model, "packed" if packed else "dense", packed)


def skeleton(hf_config: Any, dtype: torch.dtype) -> Any:
    """A model of transformers without weights: its parameters are on the meta device, its buffers are computed, on the CPU."""
    from transformers import AutoModelForCausalLM

    config = deepcopy(hf_config)
    # Of the attention implementations of transformers, only the eager one caps scores.
    capped = getattr(config.get_text_config(decoder=True), "attn_logit_softcapping", None) is not None
    with _no_weights():
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, **({"attn_implementation": "eager"} if capped else {})
        )
    return model.eval()


@contextmanager
def _uncompiled(vllm_model: nn.Module) -> Iterator[None]:
    """While open, models of transformers are made as if vLLM had not changed their classes.

    Where vLLM has no model of its own for an architecture, it takes that of transformers, and changes the class so that each new object
    is compiled by vLLM's settings of that moment.
    """
    config = next((c for m in vllm_model.modules() if (c := getattr(m, "vllm_config", None)) is not None), None)
    if config is None:
        yield
        return
    from vllm.config import CompilationMode, set_current_vllm_config

    plain = copy(config)
    plain.compilation_config = copy(config.compilation_config)
    plain.compilation_config.mode = CompilationMode.NONE
    with set_current_vllm_config(plain):
        yield


@contextmanager
def _no_weights() -> Iterator[None]:
    """While open, parameters of modules that this thread makes are on the meta device; buffers are made as usual."""
    here = threading.get_ident()

    def register(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> Any:
        if parameter is None or parameter.is_meta or threading.get_ident() != here:
            return None  # as it is
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=False)

    handle = nn.modules.module.register_module_parameter_registration_hook(register)
    try:
        with torch.device("cpu"):
            yield
    finally:
        handle.remove()


class _Sharing:
    """Gives every parameter of a skeleton its place in vLLM's weights."""

    def __init__(
        self,
        model: Any,
        weights: VLLMWeights,
        dtype: torch.dtype,
        device: torch.device,
        turn: AbstractContextManager[Any],
    ):
        self._model, self._weights, self._dtype, self._device, self._turn = model, weights, dtype, device, turn
        # By the id of the skeleton's parameter: tied weights are one parameter. That parameter is kept alive, so that its id stays unique.
        self._made: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
        self._products: dict[int, SharedProduct] = {}

    def share(self) -> tuple[str, ...]:
        """Share all weights. Returns the names of the layers that call vLLM's modules."""
        packed: list[str] = []
        for name, module in list(self._model.named_modules()):
            if isinstance(module, nn.Linear):
                if not self._view_linear(module, name):
                    parent, _, leaf = name.rpartition(".")
                    setattr(self._model.get_submodule(parent), leaf, self._packed_linear(module, name))
                    packed.append(name)
            else:
                self._view_own(module, name)
        return tuple(packed)

    def _view_linear(self, module: nn.Linear, name: str) -> bool:
        """Let a linear layer's parameters be views; False if vLLM keeps one of them in another form."""
        if module.weight.is_meta and id(module.weight) not in self._made:
            place = self._weights.linear(name, module.out_features)
            views: dict[str, Tensor] = {}
            for leaf, parameter in module.named_parameters(recurse=False):
                view = place.view(leaf, parameter.shape, self._dtype)
                if view is None:
                    return False
                views[leaf] = view
            self._assign(module, views)
            return True
        # Tied to an embedding, which stands before it.
        self._view_own(module, name)
        return True

    def _packed_linear(self, module: nn.Linear, name: str) -> PackedLinear:
        place = self._weights.linear(name, module.out_features)
        product = self._products.get(id(place.module))
        if product is None:
            run = run_of_head(place.module) if place.is_head else run_of(place.module)
            product = self._products[id(place.module)] = SharedProduct(run, self._turn)
        return PackedLinear(product, place.start, module.out_features, module.in_features, self._dtype, self._device)

    def _view_own(self, module: nn.Module, name: str) -> None:
        """Let a module's own parameters, and the buffers that are saved with it, be views of what vLLM has under the same names."""
        views: dict[str, Tensor] = {}
        for leaf, parameter in module.named_parameters(recurse=False):
            if (made := self._made.get(id(parameter))) is not None:
                setattr(module, leaf, made[1])
            else:
                transposed = bool(getattr(module, "is_transposed", False))  # of experts
                views[leaf] = self._view(f"{name}.{leaf}", parameter, transposed)
        self._assign(module, views)
        saved = {n for n in module.state_dict() if "." not in n}
        for leaf, buffer in module.named_buffers(recurse=False):
            if leaf in saved:
                setattr(module, leaf, self._view(f"{name}.{leaf}", buffer))

    def _view(self, name: str, wanted: Tensor, transposed: bool = False) -> Tensor:
        view = self._weights.view(name.lstrip("."), wanted.shape, wanted.dtype, transposed=transposed)
        if view is None:
            raise UnsupportedModelError(
                self._weights.refusal(name.lstrip("."), f"{tuple(wanted.shape)} {wanted.dtype}")
            )
        return view

    def _assign(self, module: nn.Module, views: dict[str, Tensor]) -> None:
        for leaf, view in views.items():
            before, parameter = getattr(module, leaf), nn.Parameter(view, requires_grad=False)
            self._made[id(before)] = before, parameter
            setattr(module, leaf, parameter)


def _check_shared(model: Any, weights: VLLMWeights) -> None:
    """Refuse a model that has weights in memory of its own: there must be only one copy, vLLM's."""
    theirs = weights.storages()
    for name, parameter in model.named_parameters():
        if parameter.is_meta or parameter.untyped_storage().data_ptr() not in theirs:
            raise UnsupportedModelError(f"{type(model).__name__}: {name} doesn't lie in vLLM's memory.")
    for name, buffer in model.named_buffers():
        if buffer.is_meta:
            raise UnsupportedModelError(f"{type(model).__name__}: {name} has no values.")
