"""Linear layers that are run by vLLM's own modules, for weights that vLLM keeps in a form of its own.

On a CPU vLLM packs weights for oneDNN and drops the originals; quantised weights lie in the form that their kernels read. Such weights
can't be viewed, but the modules that hold them can be called. vLLM computes some projections together (queries, keys and values; gate
and up), transformers one after the other: the first of them calls vLLM's module, the others take their columns of the same result.

On a CPU, one thread at a time may be inside vLLM's kernels: these products take turns with whatever vLLM computes (`cpu_turn.py`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from cachetune_rag.model.loaded.foreign import ForeignLinear

Run = Callable[[Tensor], Tensor]
"""A product of vLLM's: [tokens, in] -> [tokens, out]."""


class SharedProduct:
    """The result of one module of vLLM's, computed once for each input.

    Args:
        run: calls the module.
        turn: a context that is entered around each call.

    It keeps a result for as long as its input is alive, and is used by one thread at a time (the model's lock).
    """

    def __init__(self, run: Run, turn: AbstractContextManager[Any]):
        self._run, self._turn = run, turn
        self._input: weakref.ref[Tensor] | None = None
        self._output: Tensor | None = None

    def __call__(self, states: Tensor) -> Tensor:
        """The module's result for `states` [..., in]: [..., out]."""
        if self._output is None or self._input is None or self._input() is not states:
            rows = states.reshape(-1, states.shape[-1]).contiguous()
            with self._turn:
                result = self._run(rows)
            self._output = result.unflatten(0, states.shape[:-1])
            self._input = weakref.ref(states, self._forget)
        return self._output

    def _forget(self, gone: weakref.ref[Tensor]) -> None:
        if self._input is gone:
            self._input = self._output = None


class PackedLinear(ForeignLinear):
    """A linear layer of transformers' model that vLLM's module computes.

    Args:
        product: the result that it takes its columns from.
        start: the first of them.
        out_features, in_features: its shape, as `torch.nn.Linear` has it.
        dtype, device: of its results.
        finish: makes the layer's result of its columns, where there is more to do: another process may have the rest of a sum.
    """

    def __init__(
        self,
        product: SharedProduct,
        start: int,
        out_features: int,
        in_features: int,
        dtype: torch.dtype,
        device: torch.device,
        finish: Run | None = None,
    ):
        super().__init__(in_features, out_features)
        self._product, self._start, self._dtype, self._device = product, start, dtype, device
        self._finish = finish

    def forward(self, states: Tensor) -> Tensor:
        """Its result, [..., out_features]."""
        columns = self._columns(states)
        return columns if self._finish is None else self._finish(columns)

    def _columns(self, states: Tensor) -> Tensor:
        """Its columns of the module's result, [..., out_features]."""
        return self._product(states)[..., self._start : self._start + self.out_features]

    @property
    def weight(self) -> Tensor:
        """The matrix [out_features, in_features] that it multiplies by, found by multiplying the unit matrix; computed at each use."""
        unit = torch.eye(self.in_features + 1, self.in_features, dtype=self._dtype, device=self._device)
        rows = self._columns(unit)
        # The last row of the input is zero: its result is the bias.
        return (rows[:-1] - rows[-1:]).T


def run_of(linear: Any) -> Run:
    """Calls a linear module of vLLM's."""

    def run(rows: Tensor) -> Tensor:
        result = linear(rows)
        if not isinstance(result, tuple):
            return result
        output, bias = result
        return output if bias is None else output + bias  # a bias that the module leaves to its caller

    return run


def run_of_part(linear: Any) -> Run:
    """Multiplies by the part that this process has of a linear module of vLLM's, without its bias; nothing is added up."""
    return lambda rows: linear.quant_method.apply(linear, rows, None)


def run_of_head(head: Any) -> Run:
    """Multiplies by the matrix of the vLLM embedding that computes the logits; such a module can't be called like a linear layer."""
    return lambda rows: head.quant_method.apply(head, rows, bias=getattr(head, "bias", None))
