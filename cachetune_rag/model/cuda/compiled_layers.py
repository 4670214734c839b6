"""Decoder layers compiled by torch.compile, which fuses their elementwise operations.

As a model's code is written, norms, rotation, gates and residual sums are some forty small kernels in each layer. In a selective
forward, which has few tokens, they take a fifth to a third of the time. The compiler makes five or six kernels of them. Matrix products
and this package's attention stay as they are. All layers of a kind and all token counts share one compilation. Results are rounded
where uncompiled code rounds them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from cachetune_rag.model.libraries.private import (
    can_swap_compiled,
    compiled_code,
    compiler_errors,
    numbers_not_compiled_in,
    run_compiled,
)
from cachetune_rag.model.plain import attention

TOKENS = 1088
"""Token count used for compilation. No model has this width, so the compiler can't confuse the two."""
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.1}

_log = logging.getLogger(__name__)
_Function = TypeVar("_Function", bound=Callable[..., Any])


class FusedLayers:
    """The decoder layers of one model. Inside of `active` they run compiled, elsewhere as they are.

    Args:
        layers: the decoder layers, in order.
    """

    def __init__(self, layers: Sequence[nn.Module]):
        self._layers = list(layers)
        self._calls: list[Any] = []
        self._compiling = False

    @property
    def ready(self) -> bool:
        """Whether the layers are compiled."""
        return bool(self._calls)

    def compile(self, run: Callable[[], Tensor], backend: str | Callable[..., Any] = "inductor") -> bool:
        """Compile the layers. They are used from now on if they compute the same as before.

        Args:
            run: runs a forward over `TOKENS` tokens, the same each time, and enters `active` in it.
            backend: the backend of torch.compile.

        Returns:
            Whether they are used. If the code can't be compiled or computes something else, they aren't, and the log says why.
        """
        if self.ready or not can_swap_compiled():
            return self.ready
        wanted = run()
        # Attention and cache read Python state that must not be compiled in.
        AttentionInterface.register(attention.NAME, opaque(attention.blocked_attention))
        options = {"emulate_precision_casts": True} if backend == "inductor" else None
        try:
            for layer in self._layers:
                layer.compile(dynamic=True, backend=backend, options=options)
                self._calls.append(compiled_code(layer))
                run_compiled(layer, None)
            self._compiling = True
            # Without this, the compiler would compile each layer separately, because their numbers differ.
            with numbers_not_compiled_in():
                found = run()
        except compiler_errors() as error:
            _log.warning("the model's layers can't be compiled and run as they are: %s", error)
            self._calls = []
            return False
        finally:
            self._compiling = False
        off = float((found - wanted).abs().max() / wanted.abs().max())
        if not off <= _TOLERANCE.get(wanted.dtype, 0.1):
            _log.warning("the model's layers come out different when compiled (by %.2g) and run as they are.", off)
            self._calls = []
        return self.ready

    @contextmanager
    def active(self, see: Callable[[int, Tensor], None] | None = None) -> Iterator[None]:
        """While the context is open, the layers run compiled if they are ready, and `see(layer, hidden)` is called with each one's input.

        It replaces a hook, which would become part of the compiled code.
        """
        if not self._calls:
            yield
            return
        for number, (layer, call) in enumerate(zip(self._layers, self._calls, strict=True)):
            run_compiled(layer, call if see is None else _seen(see, number, call))
        # Calls that the compiled code doesn't cover run uncompiled, so that no request waits for the compiler.
        stance = nullcontext() if self._compiling else torch.compiler.set_stance("eager_on_recompile")
        try:
            with stance:
                yield
        finally:
            for layer in self._layers:
                run_compiled(layer, None)


def _seen(see: Callable[[int, Tensor], None], number: int, call: Callable[..., Any]) -> Callable[..., Any]:
    def seen(*args: Any, **kwargs: Any) -> Any:
        see(number, args[0] if args else kwargs["hidden_states"])
        return call(*args, **kwargs)

    return seen


def opaque(function: _Function) -> _Function:
    """A function that compiled code calls without compiling it."""
    made: _Function = torch.compiler.disable(function)
    return made
