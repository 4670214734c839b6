"""The engines' own copy of a model's modules, over the same weights.

A model belongs to its caller. Other threads may run it, train it, add hooks or set another attention implementation while an engine
uses it, and an engine adds hooks and sets an implementation of its own. All of that is kept in the module objects and in the
configuration, not in the weights. So engines run a second tree of modules, of the same classes and over the same weights. Changes to one
tree don't affect the other. The second tree takes some kilobytes for each layer.
"""

from __future__ import annotations

import copy
import logging
from collections import OrderedDict
from collections.abc import Iterator
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig

from cachetune_rag.model.libraries.private import (
    BUFFERS,
    COMPILED,
    HOOKS,
    MODULES,
    NON_PERSISTENT,
    PARAMETERS,
    RUN_HOOKS,
)

_log = logging.getLogger(__name__)


def unwrapped(model: Any) -> Any:
    """The model inside the wrapper of `torch.compile`; any other model unchanged."""
    return getattr(model, "_orig_mod", model)


def view_of(model: Any) -> Any:
    """A model of the same class over the same weights, in eval mode, whose modules and configuration are its own.

    It also has its own buffers, if they aren't saved with the model: rotary frequencies, which some families rewrite in every forward.
    It doesn't run hooks that the caller has put on modules. The log names these.
    """
    hooked = sorted(name or type(model).__name__ for name, module in model.named_modules() if _hooks(module))
    if hooked:
        _log.warning(
            "hooks on %s%s are not run by engines: they use the model's weights and code alone. A change that hooks make to what the "
            "model computes has to be merged into its weights.",
            ", ".join(hooked[:3]),
            f" and {len(hooked) - 3} other modules" if len(hooked) > 3 else "",
        )
    made = _Copier(model).root
    return made.eval()


class _Copier:
    """Copies a tree of modules: modules, configurations, unsaved buffers and containers of these. Everything else is shared."""

    def __init__(self, model: nn.Module):
        self._seen: dict[int, Any] = {}
        self._kept: list[Any] = []  # keeps the objects alive whose ids are keys of `_seen`
        self._configs: dict[int, Any] = {}
        modules = list(model.modules())
        for module in modules:
            self._note(module, object.__new__(type(module)))
            for name, buffer in vars(module)[BUFFERS].items():
                if buffer is not None and name in vars(module)[NON_PERSISTENT] and id(buffer) not in self._seen:
                    self._note(buffer, buffer.detach().clone())
        for module in modules:
            vars(self._seen[id(module)]).update(self._state(module))
        self.root: Any = self._seen[id(model)]

    def _note(self, thing: Any, made: Any) -> None:
        self._seen[id(thing)] = made
        self._kept.append(thing)

    def _state(self, module: nn.Module) -> dict[str, Any]:
        state: dict[str, Any] = {}
        own = {number for name in RUN_HOOKS for number, hook in vars(module)[name].items() if _takes_notes(hook)}
        for name, value in vars(module).items():
            if name in HOOKS:
                state[name] = type(value)((number, hook) for number, hook in value.items() if number in own)
            elif name in (MODULES, PARAMETERS, BUFFERS):
                # Weights are the same objects in both; which ones there are is noticed when it changes (`changes.py`).
                state[name] = type(value)((key, self._copied(part)) for key, part in value.items())
            elif name != COMPILED:  # compiled code holds the modules that it was made from
                state[name] = self._copied(value)
        return state

    def _copied(self, value: Any) -> Any:
        if id(value) in self._seen:
            return self._seen[id(value)]
        self._note(value, value)  # in case it contains itself
        if isinstance(value, PretrainedConfig):
            made = copy.deepcopy(value, self._configs)  # parts of one configuration stay parts of one
            # What a forward gives back is the caller's choice for the caller's forwards.
            made.return_dict, made.output_hidden_states, made.output_attentions = True, False, False
        elif isinstance(value, Tensor):
            return value
        elif isinstance(value, dict | list | tuple | set):
            made = self._container(value)
        elif isinstance(value, partial):
            made = partial(self._copied(value.func), *map(self._copied, value.args), **self._copied(value.keywords))
            vars(made).update(vars(value))
        elif isinstance(value, MethodType):
            made = MethodType(value.__func__, self._copied(value.__self__))
        elif isinstance(value, FunctionType) and value.__closure__:
            made = self._function(value)
        else:
            return value
        self._note(value, made)
        return made

    def _container(self, value: Any) -> Any:
        if type(value) in (list, tuple, set):
            return type(value)(map(self._copied, value))
        if type(value) in (dict, OrderedDict):
            return type(value)((key, self._copied(part)) for key, part in value.items())
        return value

    def _function(self, value: FunctionType) -> FunctionType:
        """A function that was put in a module's place for its `forward` knows the module, or its forward, by its closure."""
        before = list(_contents(value))
        after = [self._copied(c) if isinstance(c, _CALLED) else c for c in before]
        if all(a is b for a, b in zip(before, after, strict=True)):
            return value
        cells = tuple(CellType(content) for content in after)
        made = FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, cells)
        made.__kwdefaults__ = value.__kwdefaults__
        return made


_CALLED = (nn.Module, MethodType, FunctionType, partial)
"""Parts of a model that a closure may hold; everything else is the function's own state."""


def _contents(function: FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # empty so far
            yield None


def _hooks(module: nn.Module) -> bool:
    """Whether a module has hooks of the caller's that run with it."""
    return any(not _takes_notes(hook) for name in RUN_HOOKS for hook in vars(module)[name].values())


def _takes_notes(hook: Any) -> bool:
    """Whether a hook is one of those by which transformers itself collects what layers return; they change nothing."""
    return str(getattr(hook, "__module__", "")).startswith("transformers.")
