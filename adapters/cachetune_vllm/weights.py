"""Where vLLM keeps each weight of a model: under which name, in which rows of which tensor, and whether it can be viewed there.

vLLM joins some matrices of transformers' model into one (`packed_modules_mapping` of its model class says which), renames some modules
(its weight mapper says which), and pads vocabularies. All other names are the same in both.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cachetune_rag.errors import UnsupportedModelError
from cachetune_vllm.packed_block import has_experts

_JOINED: Mapping[str, Sequence[str]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""The matrices that most model classes join; used for classes that don't say."""
_EXPERTS: Mapping[str, Sequence[str]] = {
    "gate_up_proj": ("w13_weight", "routed_experts.w13_weight"),
    "down_proj": ("w2_weight", "routed_experts.w2_weight"),
    "gate_up_proj_bias": ("w13_bias", "routed_experts.w13_bias"),
    "down_proj_bias": ("w2_bias", "routed_experts.w2_bias"),
}
"""Names of experts' weights (each tensor holds all experts of a layer): by the name in transformers, those in vLLM's releases."""


@dataclass(frozen=True)
class Place:
    """The rows that one linear layer has in a module of vLLM's.

    Attributes:
        module: vLLM's module.
        start, rows: which of its output features.
        is_head: whether it is the embedding that computes the logits, which can't be called like a linear layer.
    """

    module: Any
    start: int
    rows: int
    is_head: bool

    @property
    def summed(self) -> bool:
        """Whether the module has a part of the input features, and its results are added up over several processes."""
        from vllm.model_executor.layers.linear import RowParallelLinear

        return isinstance(self.module, RowParallelLinear) and self.module.tp_size > 1

    def view(self, leaf: str, shape: torch.Size, dtype: torch.dtype) -> Tensor | None:
        """Its part of the module's parameter `leaf`, as a view; None where vLLM keeps that in another form."""
        whole = getattr(self.module, leaf, None)
        if not isinstance(whole, Tensor) or not _plain(whole, dtype) or not _unquantized(self.module):
            return None
        if whole.dim() != len(shape) or whole.shape[0] < self.start + self.rows or whole.shape[1:] != shape[1:]:
            return None
        return whole.detach()[self.start : self.start + self.rows]


class VLLMWeights:
    """The modules and tensors of a model as vLLM loaded it.

    Args:
        model: vLLM's model.
    """

    def __init__(self, model: nn.Module):
        self._model, self.architecture = model, type(model).__name__
        self._modules: dict[str, Any] = _below_adapters(model.named_modules(remove_duplicate=False))
        self._tensors: dict[str, Tensor] = _below_adapters(model.named_parameters(remove_duplicate=False))
        self._tensors |= _below_adapters(model.named_buffers(remove_duplicate=False))
        self._joined: dict[str, Sequence[str]] = dict(_JOINED)
        self._mappers: list[Any] = []
        for module in model.modules():
            self._joined.update(getattr(module, "packed_modules_mapping", None) or {})
            if (mapper := getattr(module, "hf_to_vllm_mapper", None)) is not None:
                self._mappers.append(mapper)

    def check_layers(self) -> None:
        """Refuse a model of which this process has only some layers.

        Raises:
            UnsupportedModelError: names one that it hasn't.
        """
        for name, module in self._modules.items():
            if type(module).__name__ == "PPMissingLayer":
                raise UnsupportedModelError(
                    f"{self.architecture} runs pipeline parallel ({name} lies in another process): reuse inside vLLM needs all layers in "
                    "one process. Start vLLM without --pipeline-parallel-size."
                )

    def linear(self, name: str, rows: int) -> Place:
        """Where the weights of transformers' linear layer `name`, of so many output features, are.

        Raises:
            UnsupportedModelError: vLLM's model has no such layer.
        """
        for candidate in self._names(name):
            if (module := self._modules.get(candidate)) is not None:
                return Place(module, 0, rows, _is_embedding(module))
            parent, _, leaf = candidate.rpartition(".")
            for joined, parts in self._joined.items():
                module = self._modules.get(f"{parent}.{joined}")
                if module is None or leaf not in parts:
                    continue
                # Of this process, where the layer is divided.
                sizes = list(getattr(module, "output_partition_sizes", ()))
                number = list(parts).index(leaf)
                if len(sizes) == len(parts) and sizes[number] == rows:
                    return Place(module, sum(sizes[:number]), rows, is_head=False)
        raise UnsupportedModelError(self.refusal(name, f"a linear layer of {rows} output features"))

    def experts_of(self, name: str) -> nn.Module | None:
        """vLLM's module of that name, if it holds experts."""
        for candidate in self._names(name):
            module = self._modules.get(candidate)
            if module is not None and has_experts(module):
                return module
        return None

    def embedding(self, name: str) -> Any:
        """vLLM's embedding of that name, which may hold a part of the vocabulary.

        Raises:
            UnsupportedModelError: vLLM's model has none.
        """
        for candidate in self._names(name):
            module = self._modules.get(candidate)
            if module is not None and _is_embedding(module):
                return module
        raise UnsupportedModelError(self.refusal(name, "an embedding"))

    def view(self, name: str, shape: torch.Size, dtype: torch.dtype, *, transposed: bool = False) -> Tensor | None:
        """vLLM's tensor of that name as a view of this shape; None if there is none. Rows behind the last are padding.

        Args:
            name: in transformers' model.
            shape, dtype: as transformers has it.
            transposed: transformers keeps the matrices of experts as [in, out], vLLM as [out, in].
        """
        for candidate in self._names(name):
            whole = self._tensors.get(candidate)
            if whole is None or not _plain(whole, dtype) or whole.dim() != len(shape):
                continue
            if whole.dim() == 3 and whole.device.type == "cpu":
                continue  # vLLM reorders experts' weights in place for its kernels there
            if transposed and whole.dim() == 3:
                whole = whole.transpose(1, 2)
            if whole.shape == shape or (
                whole.dim() == 2
                and whole.shape[0] > shape[0]
                and whole.shape[1] == shape[1]
                and _is_embedding(self._modules[candidate.rpartition(".")[0]])
            ):
                return whole.detach()[: shape[0]]
        return None

    def is_undivided(self, name: str, part: torch.Size, count: int) -> bool:
        """Whether vLLM keeps a vector as a whole in each of `count` processes, while its transformers' layer would have this part of it."""
        tensors = (self._tensors.get(candidate) for candidate in self._names(name))
        return any(t is not None and t.shape == (part.numel() * count,) for t in tensors)

    def storages(self) -> set[int]:
        """The addresses of all memory that the model's tensors lie in."""
        return {tensor.untyped_storage().data_ptr() for tensor in self._tensors.values()}

    def refusal(self, name: str, wanted: str) -> str:
        """Why reuse can't share vLLM's weights, for a message."""
        tensors = {n: t for n in self._names(name) if (t := self._tensors.get(n)) is not None}
        found = [f"{n} {tuple(t.shape)} {t.dtype}" for n, t in tensors.items()]
        return (
            f"{self.architecture}: vLLM's model has no weights of that shape for {name} ({wanted} in transformers' model"
            f"{'; vLLM has ' + ', '.join(found) if found else ''}), so the two can't share one copy. Requests are answered by vLLM alone "
            "without the connector; please open an issue that names the model."
        )

    def _names(self, name: str) -> Iterator[str]:
        """Names that vLLM may have for a module or tensor of transformers' model."""
        yield name
        parent, _, leaf = name.rpartition(".")
        if leaf == "mlp":
            yield f"{parent}.block_sparse_moe"  # Mixtral's name for it
        if ".mlp." in name:
            yield from self._names(name.replace(".mlp.", ".block_sparse_moe."))  # Mixtral's name for it
        if parent.endswith(".experts"):
            yield from (f"{parent}.{experts}" for experts in _EXPERTS.get(leaf, ()))
        for mapper in self._mappers:
            for renamed in mapper.apply_list([name]):
                yield renamed
            for renamed in mapper.apply_list([f"{parent}."]):
                yield f"{renamed}{leaf}"


def _below_adapters(named: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Modules or tensors by name, as if a server had no adapters: where it has (--enable-lora), a module stands around each layer,
    which has it as `base_layer`."""
    return {name.replace(".base_layer", ""): value for name, value in named}


def _plain(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether a tensor holds plain numbers of that type."""
    return tensor.dtype == dtype and tensor.layout == torch.strided and type(tensor.data) is Tensor


def _unquantized(module: Any) -> bool:
    """Whether vLLM multiplies by a module's weight as it is."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    return isinstance(
        getattr(module, "quant_method", None), UnquantizedLinearMethod | UnquantizedEmbeddingMethod | None
    )


def _is_embedding(module: Any) -> bool:
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    return isinstance(module, VocabParallelEmbedding)
