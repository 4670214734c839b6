"""All private names of torch and transformers that this package uses, and what it does if a release doesn't have one.

Everything else in this package uses public interfaces. For these things there is none. Each name is used by one function, which says what
is lost without it. tests/model/test_private.py shows which installed release lacks one.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn

from cachetune_rag.errors import UnsupportedModelError

MODULES, PARAMETERS, BUFFERS, NON_PERSISTENT = "_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"
"""The attributes in which a module keeps its parts."""
RUN_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""The attributes in which a module keeps hooks that run with it."""
HOOKS = (*RUN_HOOKS, "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")
_OPENMP_PAUSE_HARD = 2
COMPILED = "_compiled_call_impl"
"""The attribute in which a compiled module keeps the code that it runs instead of its own."""


def check_modules() -> None:
    """Refuse a torch whose modules keep their parts in other attributes: then a model can't be shared with its caller.

    Raises:
        UnsupportedModelError: names what is missing.
    """
    missing = [name for name in (MODULES, PARAMETERS, BUFFERS, NON_PERSISTENT, *HOOKS) if name not in vars(nn.Module())]
    if missing:
        raise UnsupportedModelError(
            f"torch {torch.__version__} keeps its modules' parts in other places than this release knows ({', '.join(missing)}): "
            "install a torch that its documentation names, or a newer cachetune-rag."
        )


# -- compiled layers ----------------------------------------------------------------------------------------------------


def can_swap_compiled() -> bool:
    """Whether a module's compiled code can be used for one forward only. If not, layers are not compiled."""
    return hasattr(nn.Module, COMPILED)


def compiled_code(layer: nn.Module) -> Callable[..., Any] | None:
    """The code that a compiled layer runs instead of its own."""
    made: Callable[..., Any] | None = getattr(layer, COMPILED, None)
    return made


def run_compiled(layer: nn.Module, code: Callable[..., Any] | None) -> None:
    """From now on a layer runs `code` instead of its own; None for its own."""
    setattr(layer, COMPILED, code)


def numbers_not_compiled_in() -> AbstractContextManager[Any]:
    """While the context is open, the compiler doesn't distinguish modules by numbers that are their attributes. Without this, every
    layer is compiled separately.
    """
    try:
        patch: AbstractContextManager[Any] = torch._dynamo.config.patch(allow_unspec_int_on_nn_module=True)
    except (AttributeError, KeyError):
        return nullcontext()
    return patch


def compiler_errors() -> tuple[type[BaseException], ...]:
    """The errors that torch.compile raises."""
    error = getattr(getattr(getattr(torch, "_dynamo", None), "exc", None), "TorchDynamoException", None)
    return (RuntimeError,) if error is None else (RuntimeError, error)


# -- memory ---------------------------------------------------------------------------------------------------------------


def end_allocation(pool: Any) -> None:
    """Tell torch's allocator that a failed capture is over. torch before 2.12 doesn't do this itself. The allocator would then never
    free memory again that several streams have used.
    """
    end = getattr(torch._C, "_cuda_endAllocateToPool", None)
    if end is not None:
        with suppress(RuntimeError):  # torch has done so itself
            end(torch.cuda.current_device(), pool)


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor], *, non_blocking: bool = False) -> None:
    """Copy each source into its target, with one call if torch has a function for that."""
    together = getattr(torch, "_foreach_copy_", None)
    if together is not None:
        together(list(targets), list(sources), non_blocking=non_blocking)
        return
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source, non_blocking=non_blocking)


def version_of(tensor: Tensor) -> int:
    """How often a tensor was changed in place, as autograd counts; -1 if autograd doesn't count (for tensors made in inference mode)."""
    try:
        return int(tensor._version)
    except (AttributeError, RuntimeError):
        return -1


def versions_of(tensors: Sequence[Tensor]) -> list[int]:
    """`version_of` for tensors that autograd counts. It is fast, because every request calls it for hundreds of tensors."""
    return [tensor._version for tensor in tensors]


# -- threads of torch -----------------------------------------------------------------------------------------------------


def end_openmp_threads() -> None:
    """End the threads with which torch computes on a CPU for this thread. The next operation starts new ones.

    It is called before a fork, because GNU's OpenMP would wait in the child for ever for threads that only exist in the parent. The
    function is public in OpenMP 5. Libraries without it handle forks themselves, and nothing is done.
    """
    try:
        pause = ctypes.CDLL(None).omp_pause_resource_all
    except (AttributeError, OSError, TypeError):
        return
    pause(_OPENMP_PAUSE_HARD)


# -- transformers ---------------------------------------------------------------------------------------------------------


def attention_set(config: Any) -> str | None:
    """The attention implementation that a configuration names."""
    named: str | None = getattr(config, "_attn_implementation", None)
    return named


def sdpa_is_right(model: Any) -> bool:
    """Whether a family says that sdpa computes its attention. Otherwise the implementation that is set is used (mostly eager)."""
    return bool(getattr(model, "_supports_sdpa", False))


def loaded_from(config: Any) -> str:
    """The path or hub id that a model was loaded from; "" if it isn't known."""
    return str(getattr(config, "_name_or_path", "") or "")


def loads_weights_as_they_are(model: Any) -> bool:
    """Whether transformers puts each tensor of a checkpoint into the model under its own name, changed in nothing but its dtype.

    False where it isn't known: then a model has to be loaded to see its weights.
    """
    if getattr(model.config, "quantization_config", None) is not None:
        return False
    if getattr(model, "_keep_in_fp32_modules", None) or getattr(model, "_keep_in_fp32_modules_strict", None):
        return False
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter
    except ImportError:
        return False
    return not any(isinstance(mapping, WeightConverter) for mapping in get_model_conversion_mapping(model))
