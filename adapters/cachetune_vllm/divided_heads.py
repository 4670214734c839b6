"""The heads of one of the processes that a model is divided among (vLLM's tensor parallelism)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from cachetune_rag.model.cuda.compiled_layers import opaque
from cachetune_rag.model.cuda.graphs import Exchange
from cachetune_rag.model.heads import Heads, SharedHeads
from cachetune_store.layout import LayerSpec
from cachetune_vllm.gathering import gathered
from cachetune_vllm.turns import Turns

_T = TypeVar("_T")

PATIENCE = timedelta(seconds=30)
"""How long a process whose turn failed waits to hear whether that of all others did."""


class HeadsInTurns(Heads):
    """All heads are here, but the model must not be run while vLLM runs it.

    Attributes:
        turns: when this process's thread may compute.
    """

    in_turns = True
    graphs = False  # a block of experts may pause the turn in the middle of a layer

    def __init__(self) -> None:
        self.turns = Turns(lambda _error: True)

    def computing(self, meanwhile: Callable[[], None] | None = None) -> AbstractContextManager[None]:
        """See `Heads`."""
        return self.turns.taken(meanwhile)

    def in_step(self, value: _T) -> list[_T]:
        """What the threads of all peers tell."""
        return [value]

    def raised_on_all(self, error: BaseException) -> bool:
        """See `DividedHeads`."""
        return True


class DividedHeads(SharedHeads):
    """See `Heads`. Where there are fewer key-value heads than processes, neighbours have the same one, as in vLLM.

    What the model computes is added up through vLLM's own communicator, in turns with vLLM's steps (`turns.py`). What else the processes
    tell each other goes through groups of their own, on the CPU: they wait for no GPU, and may be used at any time.

    Args:
        group: vLLM's group of the processes (its `GroupCoordinator`).
        kv_heads: key-value heads of the whole model.

    Attributes:
        turns: when this process's thread may compute.
        count, number: how many processes there are, and which one this is.
    """

    def __init__(self, group: Any, kv_heads: int):
        self._group, self._kv_heads = group, kv_heads
        self.count, self.number = int(group.world_size), int(group.rank_in_group)
        # One for each thread that talks, in the same order on all of them.
        self._talk = _cpu_group(group.ranks)
        self._steps = _cpu_group(group.ranks)
        self._failures = _cpu_group(group.ranks, PATIENCE)
        self._sums = 0
        self._exchange: Exchange | None = None
        self.turns = Turns(self._failed_alike)

    def stored(self, spec: LayerSpec) -> LayerSpec:
        """See `Heads`."""
        return LayerSpec(self._kv_heads, spec.head_dim, spec.v_head_dim)

    def own(self, spec: LayerSpec) -> slice:
        """See `Heads`."""
        first = self.number // self._copies if self._copies > 1 else self.number * spec.heads
        return slice(first, first + spec.heads)

    @property
    def _copies(self) -> int:
        """How many processes have the same key-value head."""
        return max(1, self.count // self._kv_heads)

    # -- while the model computes ---------------------------------------------------------------------------------

    # Compiled layers call these as they are: what they count, and whether a turn is used up, must not be compiled in. A replay of graphs calls the methods
    # behind them instead, which call vLLM's communicator. vLLM's group would do the same through an operator of torch. These two detours together
    # take the host some 40 microseconds, and a prompt has 66 exchanges with 32 layers, twice as many where a selector looks at all of them.

    @contextmanager
    def recorded(self, exchange: Exchange) -> Iterator[None]:
        """See `Heads`."""
        self._exchange = exchange
        try:
            yield
        finally:
            self._exchange = None

    @opaque
    def total(self, numbers: Tensor) -> Tensor:
        """See `Heads`."""
        return self._total(numbers) if self._exchange is None else self._exchange(self._total, numbers, numbers.shape)

    def mean(self, numbers: Tensor) -> Tensor:
        """See `Heads`."""
        return self.total(numbers) / self.count

    def every(self, states: Tensor) -> Tensor:
        """See `Heads`."""
        return self.joined(states, 1)[:, :: self._copies]

    @opaque
    def joined(self, part: Tensor, dim: int) -> Tensor:
        """The parts that all processes have of a tensor, one behind the other in a dimension."""
        if self._exchange is None:
            return self._joined(part, dim)
        shape = list(part.shape)
        shape[dim] *= self.count
        return self._exchange(partial(self._joined, dim=dim), part, shape)

    @opaque
    def added_up(self, rows: Tensor) -> Tensor:
        """The sum of what the processes' parts of a layer give, [..., width]. The turn may pause here."""
        return self._added_up(rows) if self._exchange is None else self._exchange(self._added_up, rows, rows.shape)

    def _total(self, numbers: Tensor) -> Tensor:
        self._sums += 1
        total: Tensor = self._group.device_communicator.all_reduce(numbers.contiguous())
        return total

    def _joined(self, part: Tensor, dim: int) -> Tensor:
        self._sums += 1
        whole: Tensor = self._group.device_communicator.all_gather(part.contiguous(), dim)
        return whole

    def _added_up(self, rows: Tensor) -> Tensor:
        total = self._total(rows)
        self.turns.spend(total.shape[:-1].numel())
        return total

    def computing(self, meanwhile: Callable[[], None] | None = None) -> AbstractContextManager[None]:
        """See `Heads`."""
        return self.turns.taken(meanwhile)

    # -- on the CPU -----------------------------------------------------------------------------------------------

    def exchanged(self, value: _T) -> list[_T]:
        """See `SharedHeads`."""
        return gathered(value, self._talk)

    def in_step(self, value: _T) -> list[_T]:
        """What vLLM's threads of all processes tell."""
        return gathered(value, self._steps)

    def _failed_alike(self, error: BaseException) -> bool:
        try:
            alike = len(set(gathered(self._sums, self._failures))) == 1
        except RuntimeError:  # others didn't fail
            return False
        self.mark(error)
        return alike


def _cpu_group(ranks: list[int], timeout: timedelta | None = None) -> Any:
    return dist.new_group(ranks, backend="gloo", timeout=timeout, use_local_synchronization=True)
