"""Which of a model's heads this process has, and how it works together with the processes that have the others.

Usually one process has all of them (`Heads`). A server may divide a model among several processes, its peers: each runs the same layers with
its own heads, and they add up what their heads contribute to a layer's output. Stored chunks hold the rows of all heads.

Peers have to do the same, or one of them waits for the others for ever. So whatever depends on one process's luck (a chunk that it can't
read, a request that it hears is over) is settled by an agreement (`together`, `agreed`, `tell`), and nothing of that kind may happen inside of
`computing`. Every agreement waits for the slowest peer and for messages between processes, so a prompt has few of them: what can be settled
together is done in one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

from torch import Tensor

from cachetune_rag.errors import CacheTuneError
from cachetune_rag.model.cuda.graphs import Exchange
from cachetune_store.layout import LayerSpec

_T = TypeVar("_T")
_U = TypeVar("_U")

_ON_ALL = "cachetune_raised_on_all"
"""The attribute of an error that all peers have."""


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

    def agreed(self, work: Callable[[], tuple[_T, _U]], again: tuple[type[Exception], ...] = ()) -> tuple[_T, list[_U]]:
        """Do work that may fail here and not on other peers. It succeeds on all of them, or raises on all of them.

        Args:
            work: is called once; it may wait. If it runs the model, nothing that may fail on one peer alone comes before that. It gives what is
                for this peer, and what the others are told.
            again: the errors that are worth another attempt, see `PeerError`.

        Returns:
            What the work gave for this peer, and what every peer was told to say, in the same order on all of them.

        Raises:
            PeerError: the work succeeded here and failed elsewhere. (Where it failed, its own error is raised.)
        """
        mine, said = work()
        return mine, [said]

    def together(self, work: Callable[[], _T], again: tuple[type[Exception], ...] = ()) -> _T:
        """As `agreed`, of work that has nothing to tell."""
        return self.agreed(lambda: (work(), None), again)[0]

    def tell(self, value: _T) -> list[_T]:
        """What every peer told, in the same order on all of them."""
        return self.agreed(lambda: (None, value))[1]

    def ahead(self, work: Callable[[], _T]) -> _T:
        """Do work that may fail here and not on other peers, where the next thing that all peers do with each other is an agreement. Nothing is exchanged
        where it succeeds; where it fails, peers hear of it in that agreement, which raises on all of them.
        """
        return work()

    def computing(self, meanwhile: Callable[[], None] | None = None) -> AbstractContextManager[None]:
        """The context in which the model is run. Everything inside has to be the same on all peers.

        Args:
            meanwhile: called again and again as long as the context has to be waited for; what it does concerns this peer alone. An error of it is
                raised as if it came inside.
        """
        return nullcontext()


class SharedHeads(Heads, ABC):
    """Some of a model's heads; peers have the others. What a subclass adds is how they reach each other."""

    shared = in_turns = True

    @abstractmethod
    def exchanged(self, value: _T) -> list[_T]:
        """What every peer hands in, in the same order on all of them. It waits until all have done so."""

    def agreed(self, work: Callable[[], tuple[_T, _U]], again: tuple[type[Exception], ...] = ()) -> tuple[_T, list[_U]]:
        """See `Heads`. One exchange, whether the work succeeds or not."""
        failed: Exception | None = None
        told: Any = None
        try:
            mine, told = work()
        except Exception as error:  # it is raised below, once the others know
            failed = error
        fault = None if failed is None else (isinstance(failed, again), type(failed).__name__, str(failed))
        said = self.exchanged((fault, told))
        others = [what for what, _ in said if what is not None]
        if not others:
            return mine, [value for _, value in said]
        grave = [what for what in others if not what[0]]
        if failed is None or (grave and isinstance(failed, again)):
            # Where one of them can't go on, none of them can.
            _, kind, text = (grave or others)[0]
            failed = PeerError(f"another worker failed: {kind}: {text}", again=not grave, kind=kind)
        self.mark(failed)
        try:
            raise failed
        finally:
            # It refers to this frame, and to that of the prompt, which only Python's collector would free then.
            del failed

    def ahead(self, work: Callable[[], _T]) -> _T:
        """See `Heads`."""
        failed: list[Exception] = []
        try:
            return work()
        except Exception as error:
            failed.append(error)

        def fail() -> _T:
            raise failed.pop()

        return self.together(fail)

    def raised_on_all(self, error: BaseException) -> bool:
        """Whether all peers have this error, or one because of it, so that they go on alike."""
        return getattr(error, _ON_ALL, False)

    def mark(self, error: BaseException) -> None:
        """Remember that all peers have this error. The mark is on the error itself: whoever remembers an error keeps all that its frames refer to,
        the prompt's buffers on the device among them."""
        setattr(error, _ON_ALL, True)


ALL_HEADS = Heads()
