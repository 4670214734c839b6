"""Which of a model's heads this process has, and how it works together with the processes that have the others.

Usually one process has all of them (`Heads`). A server may divide a model among several processes, its peers: each runs the same layers with
its own heads, and they add up what their heads contribute to a layer's output. Stored chunks hold the rows of all heads.

Peers have to do the same, or one of them waits for the others for ever. So whatever depends on one process's luck (a chunk that it can't
read, a request that it hears is over) is settled by `together`, and nothing of that kind may happen inside of `computing`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

from torch import Tensor

from cachetune_rag.errors import CacheTuneError
from cachetune_rag.model.cuda.graphs import Exchange
from cachetune_store.layout import LayerSpec

_T = TypeVar("_T")


class PeerError(CacheTuneError):
    """Work that every peer has to succeed with failed on another one.

    Attributes:
        again: whether it failed there in a way that is worth another attempt.
        kind: the name of the error's class there.
    """

    def __init__(self, message: str, *, again: bool, kind: str = ""):
        super().__init__(message)
        self.again, self.kind = again, kind


class Heads:
    """All heads of a model are in this process."""

    shared = False
    """Whether other processes have some of the heads."""
    in_turns = False
    """Whether `computing` waits for somebody else's turn to end, and keeps others waiting: disks are to be waited for before."""

    graphs = True
    """Whether forwards may be captured as CUDA graphs."""

    def stored(self, spec: LayerSpec) -> LayerSpec:
        """The shape of a layer's rows as chunks store them, of all heads; `spec` is its shape in this process."""
        return spec

    def own(self, spec: LayerSpec) -> slice:
        """Which of the stored key-value heads of a layer this process has; `spec` is the layer's shape in this process."""
        return slice(0, spec.heads)

    def total(self, numbers: Tensor) -> Tensor:
        """The sum of what every query head contributes; `numbers` are the sum over the query heads of this process."""
        return numbers

    def mean(self, numbers: Tensor) -> Tensor:
        """The mean over all query heads; `numbers` are the mean over those of this process."""
        return numbers

    def every(self, states: Tensor) -> Tensor:
        """Keys or values of all key-value heads, from those of this process [tokens, heads, dim]."""
        return states

    def recorded(self, exchange: Exchange) -> AbstractContextManager[None]:
        """The context in which a forward is captured as CUDA graphs: what would be exchanged with peers goes through `exchange`, and nothing is
        exchanged.

        Args:
            exchange: notes what is to be done with peers in each replay.
        """
        return nullcontext()

    def together(self, work: Callable[[], _T], again: tuple[type[Exception], ...] = ()) -> _T:
        """Do work that may fail here and not on other peers. It succeeds on all of them, or raises on all of them.

        Args:
            work: is called once; it may wait. If it runs the model, nothing that may fail on one peer alone comes before that.
            again: the errors that are worth another attempt, see `PeerError`.

        Raises:
            PeerError: the work succeeded here and failed elsewhere. (Where it failed, its own error is raised.)
        """
        return work()

    def tell(self, value: _T) -> list[_T]:
        """What every peer told, in the same order on all of them."""
        return [value]

    def computing(self) -> AbstractContextManager[None]:
        """The context in which the model is run. Everything inside has to be the same on all peers."""
        return nullcontext()


ALL_HEADS = Heads()
