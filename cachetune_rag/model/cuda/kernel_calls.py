"""Makes the calls of the kernels for a model's forwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cachetune_rag.model.cuda.graphs import Inputs, Kind
from cachetune_rag.model.cuda.kernel_call import KernelCall, Probing, Shifting
from cachetune_rag.model.family.rope import Turn
from cachetune_store.layout import LayerSpec


class KernelCalls:
    """What the kernels are told of a model, beside a forward's inputs.

    Args:
        specs, windows, gains, turns, device: see `DeviceForward`.
    """

    def __init__(
        self,
        specs: Sequence[LayerSpec],
        windows: Sequence[int | None],
        gains: Callable[[], list[Tensor]],
        turns: Callable[[int], list[Turn | None]],
        device: torch.device,
    ):
        self._specs, self._windows, self._device = list(specs), list(windows), device
        self._make_gains, self._turns = gains, turns
        self._totals: Tensor | None = None
        self._held: list[Turn | None] = []

    def make(self, kind: Kind, inputs: Inputs) -> KernelCall:
        """The call of one forward, which reads `inputs`."""
        call = KernelCall(inputs.table, inputs.positions, self._specs, self._windows)
        empty: Any = {"dtype": torch.float32, "device": self._device}
        if kind.probed is not None:
            rows = max(spec.heads for spec in self._specs) if kind.errors else 1
            call.probing = Probing(
                inputs.watched,
                kind.probed - 1,
                self._zeros(rows, kind.length),
                inputs.deviations if kind.errors else None,
                self._starts[: kind.probed + 1],
                self._gains if kind.errors else (),
                torch.empty(kind.tokens, **empty),
                None if kind.listed is None else (inputs.rows, inputs.count),
                kind.listed or 0,
            )
        if kind.chunks:
            widths = (max(s.heads * s.head_dim for s in self._specs), max(s.heads * s.v_head_dim for s in self._specs))
            moved = (torch.empty(kind.chunks, widths[0], **empty), torch.empty(kind.chunks, widths[1], **empty))
            call.shifting = Shifting(inputs.known, inputs.spans, inputs.rotations, self._turnings, moved)
        return call

    def columns(self, layers: int) -> int:
        """How many columns the deviations of the first `layers` layers have."""
        return self._starts[layers]

    def rotations(self, length: int) -> list[int]:
        """Addresses of every layer's cosines and sines for a prompt. They hold until this is called for the next prompt."""
        self._held = self._turns(length)
        tables = [(0, 0) if turn is None else (turn.cos.data_ptr(), turn.sin.data_ptr()) for turn in self._held]
        return [address for pair in tables for address in pair]

    def _zeros(self, rows: int, length: int) -> Tensor:
        """Zeros for what a probe adds up, float32 [rows, length]. All probes have the same memory, because only one runs at a time; a graph keeps the memory that it was captured with."""
        count = rows * length
        if self._totals is None or self._totals.numel() < count:
            with torch.inference_mode(False):  # probes write to it inside and outside of inference mode
                self._totals = torch.empty(count, dtype=torch.float32, device=self._device)
        return self._totals[:count].view(rows, length).zero_()

    @cached_property
    def _gains(self) -> list[Tensor]:
        return self._make_gains()

    @cached_property
    def _starts(self) -> list[int]:
        """The first column of each layer's deviations, and then the number of all columns."""
        return [0, *np.cumsum([2 * spec.heads for spec in self._specs]).tolist()]

    @cached_property
    def _turnings(self) -> list[tuple[Tensor, Tensor] | None]:
        """For each layer: with which channel each channel is rotated, and the sign."""
        made: list[tuple[Tensor, Tensor] | None] = []
        for turn, spec in zip(self._turns(1), self._specs, strict=True):
            if turn is None:
                made.append(None)
                continue
            count = torch.arange(1, spec.head_dim + 1, dtype=torch.float32, device=self._device)
            across = turn.quarter(count[None, None])[0, 0]
            made.append(((across.abs() - 1).round().int().contiguous(), across.sign().contiguous()))
        return made
