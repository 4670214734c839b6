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
from cachetune_rag.model.heads import ALL_HEADS, Heads
from cachetune_vllm.cpu_turn import take_turns
from cachetune_vllm.divided_heads import DividedHeads
from cachetune_vllm.divided_layers import DividedEmbedding, DividedHead, SummedLinear, divided_config
from cachetune_vllm.packed import PackedLinear, Run, SharedProduct, run_of, run_of_head, run_of_part
from cachetune_vllm.packed_block import PackedBlock
from cachetune_vllm.weights import Place, VLLMWeights


@dataclass(frozen=True)
class ServedModel:
    """A model of transformers that shares vLLM's weights.

    Attributes:
        model: the model, in eval mode.
        form: "dense" where every parameter is a view of vLLM's tensors; "packed" where some layers call vLLM's modules.
        packed: the names of the layers that call vLLM's modules.
        config: the configuration of the whole model.
        heads: which of its heads `model` has.
        blocks: the mixtures of experts that are vLLM's. With any, the model must not be run while vLLM runs a forward.
    """

    model: Any
    form: Literal["dense", "packed"]
    packed: tuple[str, ...]
    config: Any
    heads: Heads = ALL_HEADS
    blocks: tuple[PackedBlock, ...] = ()


def served_model(
    vllm_model: nn.Module,
    hf_config: Any,
    dtype: torch.dtype,
    device: torch.device,
    heads: Heads = ALL_HEADS,
    vllm_config: Any = None,
) -> ServedModel:
    """Make transformers' model over the weights of vLLM's.

    Args:
        vllm_model: the model as vLLM loaded it.
        hf_config: its configuration, as transformers reads it from the checkpoint.
        dtype: what it computes in.
        device: where its weights are.
        heads: which heads are in this process.
        vllm_config: vLLM's configuration; needed for mixtures of experts that are vLLM's.

    Raises:
        UnsupportedModelError: names the layer whose weights can't be shared, and the reason.
    """
    weights = VLLMWeights(vllm_model)
    weights.check_layers()
    divided = heads if isinstance(heads, DividedHeads) else None
    config = hf_config if divided is None else divided_config(hf_config, divided.count)
    with _uncompiled(vllm_model):
        model = skeleton(config, dtype)
    turn = take_turns(vllm_model) if device.type == "cpu" else nullcontext()
    sharing = _Sharing(model, weights, dtype, device, turn, divided, vllm_config)
    packed = sharing.share()
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    model.requires_grad_(False)
    _check_shared(model, weights)
    return ServedModel(model, "packed" if packed else "dense", packed, hf_config, heads, tuple(sharing.blocks))


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
        divided: DividedHeads | None,
        vllm_config: Any,
    ):
        self._model, self._weights, self._dtype, self._device, self._turn = model, weights, dtype, device, turn
        self._divided, self._vllm_config = divided, vllm_config
        self.blocks: list[PackedBlock] = []
        # By the id of the skeleton's parameter: tied weights are one parameter. That parameter is kept alive, so that its id stays unique.
        self._made: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
        self._products: dict[int, SharedProduct] = {}
        self._embeddings: dict[int, Any] = {}  # vLLM's, by the id of the skeleton's parameter, where they are divided

    def share(self) -> tuple[str, ...]:
        """Share all weights. Returns the names of the layers that call vLLM's modules."""
        packed: list[str] = []
        head, replaced = self._model.get_output_embeddings(), list[str]()
        for name, module in list(self._model.named_modules()):
            if any(name.startswith(f"{block}.") for block in replaced):
                continue
            if (block := self._packed_block(module, name)) is not None:
                self._replace(name, block)
                self.blocks.append(block)
                replaced.append(name)
                packed.append(name)
            elif self._divided is not None and isinstance(module, nn.Embedding):
                self._replace(name, self._divided_embedding(module, name, self._divided))
            elif self._divided is not None and module is head:
                made = self._divided_head(module, name, self._divided)
                self._replace(name, made)
                packed += [name] * isinstance(made.part, PackedLinear)
            elif isinstance(module, nn.Linear):
                if not self._view_linear(module, name):
                    self._replace(name, self._packed_linear(module, name))
                    packed.append(name)
            else:
                self._view_own(module, name)
        return tuple(packed)

    def _replace(self, name: str, made: nn.Module) -> None:
        parent, _, leaf = name.rpartition(".")
        setattr(self._model.get_submodule(parent), leaf, made)

    def _packed_block(self, module: nn.Module, name: str) -> PackedBlock | None:
        """vLLM's block in place of a mixture of experts whose weights can't be viewed; None for any other module."""
        experts = getattr(module, "experts", None)
        if not isinstance(experts, nn.Module) or (theirs := self._weights.experts_of(name)) is None:
            return None
        transposed = bool(getattr(experts, "is_transposed", False))
        views = (
            self._weights.view(f"{name}.experts.{leaf}", p.shape, p.dtype, transposed=transposed)
            for leaf, p in experts.named_parameters()
        )
        if self._vllm_config is None or all(view is not None for view in views):
            return None
        return PackedBlock(theirs, module, self._vllm_config, self._turn)

    def _divided_embedding(self, module: nn.Embedding, name: str, divided: DividedHeads) -> DividedEmbedding:
        theirs = self._weights.embedding(name)
        place = Place(theirs, 0, int(theirs.num_embeddings_per_partition), is_head=True)
        view = place.view("weight", torch.Size((place.rows, module.embedding_dim)), self._dtype)
        if view is None:
            raise UnsupportedModelError(self._weights.refusal(name, f"{module.embedding_dim} columns, {self._dtype}"))
        self._embeddings[id(module.weight)] = theirs
        self._assign(module, {"weight": view})
        shard = theirs.shard_indices
        first, end = int(shard.org_vocab_start_index), int(shard.org_vocab_end_index)
        return DividedEmbedding(module, first, end - first, module.num_embeddings, divided)

    def _divided_head(self, module: nn.Linear, name: str, divided: DividedHeads) -> DividedHead:
        # vLLM may have no module for a head that is tied to the embedding.
        theirs = self._embeddings.get(id(module.weight)) or self._weights.embedding(name)
        rows = int(theirs.num_embeddings_per_partition)
        part: nn.Linear | PackedLinear = nn.Linear(
            module.in_features, rows, module.bias is not None, device="meta", dtype=self._dtype
        )
        place, views = Place(theirs, 0, rows, is_head=True), {}
        for leaf, parameter in part.named_parameters(recurse=False):
            views[leaf] = place.view(leaf, parameter.shape, self._dtype)
        if any(view is None for view in views.values()):
            product = SharedProduct(run_of_head(theirs), self._turn)
            part = PackedLinear(product, 0, rows, module.in_features, self._dtype, self._device)
        else:
            self._assign(part, {leaf: view for leaf, view in views.items() if view is not None})
        return DividedHead(part, module.in_features, module.out_features, divided)

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
            if place.summed and self._divided is not None:
                module = SummedLinear(module, self._divided)
                self._replace(name, module)
            self._assign(module, views)
            return True
        # Tied to an embedding, which stands before it.
        self._view_own(module, name)
        return True

    def _packed_linear(self, module: nn.Linear, name: str) -> PackedLinear:
        place = self._weights.linear(name, module.out_features)
        product = self._products.get(id(place.module))
        if product is None:
            whole = run_of_head if place.is_head else run_of
            run = run_of_part(place.module) if place.summed else whole(place.module)
            product = self._products[id(place.module)] = SharedProduct(run, self._turn)
        return PackedLinear(
            product,
            place.start,
            module.out_features,
            module.in_features,
            self._dtype,
            self._device,
            self._finish(place),
        )

    def _finish(self, place: Place) -> Run | None:
        """Adds up over the processes what each one's part of a layer gives, and then the layer's bias."""
        if not place.summed or self._divided is None:
            return None
        divided, bias = self._divided, place.module.bias
        return lambda rows: divided.added_up(rows) if bias is None else divided.added_up(rows) + bias

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
        if view is not None:
            return view
        name = name.lstrip(".")
        divided = self._divided
        if divided is not None and self._weights.is_undivided(name, wanted.shape, divided.count):
            raise UnsupportedModelError(
                f"{self._weights.architecture}: {name} is for the heads of all {divided.count} workers together, and each has its own heads "
                "only (--tensor-parallel-size). Reuse can't norm over the heads of several workers yet."
            )
        raise UnsupportedModelError(self._weights.refusal(name, f"{tuple(wanted.shape)} {wanted.dtype}"))

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
