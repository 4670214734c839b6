"""Notices that a model's weights are no longer those that stored keys and values were computed with.

An engine isn't told when its caller merges an adapter or continues training. Reading all weights would show it, but takes seconds.
So before and after each use an engine checks what costs almost nothing:

- which modules and parameters there are (a layer wrapped by an adapter, a parameter replaced),
- how often autograd has counted a change in place (an optimiser's step, `load_state_dict`, `add_`),
- where each weight's memory is, and its dtype (`model.to(...)`, `weight.data = ...`),
- a few elements of each weight (`weight.data += ...`, which autograd doesn't count); on a GPU, where reading them means waiting, each
  request checks a different part of the weights,
- which PEFT adapters are active, merged or scaled differently.

A change of a few single elements through `.data` or NumPy is not noticed, nor are other attributes of modules: then the caller calls
`CacheTune.model_changed`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor, nn

from cachetune_rag.model.libraries.private import BUFFERS, MODULES, NON_PERSISTENT, PARAMETERS, version_of, versions_of

SAMPLES = 8
"""Elements that are compared at each of two places of a weight."""
TOGETHER = 32
"""Places that are compared together on a GPU, by one kernel."""


class Weights:
    """A model's weights as they are now.

    Args:
        model: the caller's own object, whose modules the caller changes.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._names = {id(m): name or type(model).__name__ for name, m in model.named_modules()}
        parts = [vars(module) for module in model.modules()]
        # The modules' own dictionaries, so that additions and removals show.
        self._dicts = [part[kind] for part in parts for kind in (PARAMETERS, MODULES) if part[kind]]
        self._copies = [dict(part) for part in self._dicts]
        self._buffers = [
            (part[BUFFERS], name, buffer)
            for part in parts
            for name, buffer in part[BUFFERS].items()
            if buffer is not None and name not in part[NON_PERSISTENT]
        ]
        # A tied weight is one tensor under two names.
        weights = chain(model.named_parameters(), model.named_buffers())
        self._tensors = {name: tensor for name, tensor in weights if tensor is not None and not _rewritten(model, name)}
        counted = {name: tensor for name, tensor in self._tensors.items() if version_of(tensor) >= 0}
        self._counted, self._counted_names = list(counted.values()), list(counted)
        self._versions = versions_of(self._counted)
        placed = {name: tensor for name, tensor in self._tensors.items() if _address(tensor) is not None}
        self._placed, self._placed_names = list(placed.values()), list(placed)
        self._addresses = list(map(Tensor.data_ptr, self._placed))
        self._samples = _samples(placed)
        self._adapters = list(adapters_of(model))
        self._tuners = [module for module in model.modules() if _is_tuner(module)]

    def change(self, *, every: bool = True) -> str | None:
        """What has changed, in words that continue "the model was changed: "; None if nothing seems to have changed.

        Args:
            every: compare elements of every weight. False: on a GPU, of a different part of the weights with each call.
        """
        if not self._same_parts():
            return self._structure()
        for parts, name, buffer in self._buffers:
            if parts.get(name) is not buffer:
                return f"buffer {name} was replaced"
        if (change := self.counted_change()) is not None:
            return change
        if (addresses := list(map(Tensor.data_ptr, self._placed))) != self._addresses:
            return f"{_first(self._placed_names, addresses, self._addresses)} lies in other memory (moved, or its data replaced)"
        for sample in self._samples:
            if (name := sample.change(every=every)) is not None:
                return f"{name} has other values"
        if self._tuners and (now := list(adapters_of(self._model))) != self._adapters:
            return f"its adapters are {_told(now)} instead of {_told(self._adapters)}"
        return None

    def counted_change(self) -> str | None:
        """As `change`, but checks only the changes that autograd counts."""
        versions = versions_of(self._counted)
        if versions == self._versions:
            return None
        return f"{_first(self._counted_names, versions, self._versions)} was changed in place"

    def _same_parts(self) -> bool:
        # Comparing dictionaries compares their values by identity first, three times as fast as Python code would. A different
        # tensor is then compared element by element, which raises, for the result isn't one bool.
        try:
            return self._dicts == self._copies
        except (RuntimeError, TypeError, ValueError):
            return False

    def _structure(self) -> str:
        """Names the module or parameter that was replaced, added or removed."""
        known = {id(part) for copy in self._copies for part in copy.values()}
        for name, module in self._model.named_modules():
            if id(module) not in known and module is not self._model:
                return f"module {name} ({type(module).__name__}) was put in"
            for key, parameter in vars(module)[PARAMETERS].items():
                if id(parameter) not in known:
                    return f"parameter {f'{name}.{key}'.lstrip('.')} was replaced"
        return "modules or parameters were taken out"


class _HostSample:
    """Some elements of all weights in the host's memory, as their bytes."""

    def __init__(self, names: list[str], views: list[Tensor]):
        # Joining bytes is a hundred times faster than joining tensors.
        arrays: list[Any] = [view.numpy() for view in views]
        self._names, self._views = names, [memoryview(array).cast("B") for array in arrays]
        self._values = b"".join(self._views)

    def change(self, *, every: bool) -> str | None:
        """The name of a weight whose elements are different."""
        if (now := b"".join(self._views)) == self._values:
            return None
        at = next(i for i, (a, b) in enumerate(zip(now, self._values, strict=True)) if a != b)
        ends = accumulate(view.nbytes for view in self._views)
        return next(name for name, end in zip(self._names, ends, strict=True) if at < end)


class _DeviceSample:
    """Some elements of all weights of one width that lie on a device."""

    def __init__(self, names: list[str], views: list[Tensor]):
        pairs = list(zip(names, views, strict=True))
        # Shuffled, because a change usually affects one kind of weight: the same projection of every layer.
        random.Random(0).shuffle(pairs)
        self._parts = [_DevicePart(pairs[at : at + TOGETHER]) for at in range(0, len(pairs), TOGETHER)]
        self._next = 0

    def change(self, *, every: bool) -> str | None:
        """The name of a weight whose elements are different."""
        parts = self._parts if every else [self._parts[self._next]]
        self._next = (self._next + 1) % len(self._parts)
        return next((name for part in parts if (name := part.change()) is not None), None)


class _DevicePart:
    def __init__(self, pairs: list[tuple[str, Tensor]]):
        self._names, self._views = [name for name, _ in pairs], [view for _, view in pairs]
        self._values = torch.cat(self._views)

    def change(self) -> str | None:
        now = torch.cat(self._views)
        if torch.equal(now, self._values):
            return None
        at = int((now != self._values).nonzero()[0, 0])
        ends = accumulate(view.shape[0] for view in self._views)
        return next(name for name, end in zip(self._names, ends, strict=True) if at < end)


def _samples(tensors: dict[str, Tensor]) -> list[_HostSample | _DeviceSample]:
    groups: dict[Any, tuple[list[str], list[Tensor]]] = {}
    for name, tensor in tensors.items():
        for view in _some(tensor):
            names, views = groups.setdefault((view.dtype, view.device), ([], []))
            names.append(name)
            views.append(view)
    return [
        (_HostSample if in_host_memory(device) else _DeviceSample)(names, views)
        for (_, device), (names, views) in groups.items()
    ]


def in_host_memory(device: torch.device) -> bool:
    """Whether elements of tensors there can be read without waiting for a device."""
    return device.type == "cpu"


def _some(tensor: Tensor) -> Iterator[Tensor]:
    """A few elements from two places of a tensor's memory, as their bits; none of kinds of tensors that have no plain memory."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(tensor.element_size())
    if bits is None or tensor.layout != torch.strided or tensor.numel() == 0 or type(tensor.data) is not Tensor:
        return
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    count = min(SAMPLES, span)
    for start in sorted({(span - count) // 3, (span - count) * 2 // 3}):
        yield tensor.detach().as_strided((count,), (1,), tensor.storage_offset() + start).view(bits)


def adapters_of(model: nn.Module) -> Iterator[tuple[Any, ...]]:
    """What PEFT's layers say about themselves: which adapters are active, merged, switched off, and how they are scaled."""
    for name, module in model.named_modules():
        if _is_tuner(module):
            layer: Any = module
            scaling = getattr(layer, "scaling", None)
            yield (
                name,
                tuple(map(str, layer.active_adapters)),
                tuple(map(str, layer.merged_adapters)),
                bool(getattr(layer, "disable_adapters", False)),
                tuple(sorted((str(k), str(v)) for k, v in scaling.items())) if isinstance(scaling, dict) else (),
            )


def _is_tuner(module: nn.Module) -> bool:
    return hasattr(type(module), "active_adapters") and hasattr(module, "merged_adapters")


def _told(adapters: list[tuple[Any, ...]]) -> str:
    """Describes the adapters of the first layer; the others usually have the same."""
    if not adapters:
        return "none"
    name, active, merged, off, scaling = adapters[0]
    words = [
        f"{', '.join(active) or 'none'} active",
        f"{', '.join(merged) or 'none'} merged",
        *(["switched off"] if off else []),
    ]
    return f"({'; '.join(words)}; scaled {dict(scaling)} in {name})"


def _rewritten(model: nn.Module, name: str) -> bool:
    """Whether a buffer isn't saved with the model: some families rewrite such buffers during a forward."""
    path, _, leaf = name.rpartition(".")
    return leaf in vars(model.get_submodule(path))[NON_PERSISTENT]


def _address(tensor: Tensor) -> int | None:
    try:
        return tensor.data_ptr()
    except RuntimeError:  # kinds of tensors without memory of their own
        return None


def _first(names: list[str], now: list[int], before: list[int]) -> str:
    return next(name for name, a, b in zip(names, now, before, strict=True) if a != b)
