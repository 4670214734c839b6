"""The CUDA graphs that a model's forwards have: which are captured, how, and what happens where a capture fails."""

from __future__ import annotations

import gc
import logging
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from cachetune_rag.model.cuda.graphs import Exchange, ExchangeMemory, Graph, Inputs, Kind, Recorder, nothing
from cachetune_rag.model.cuda.kernel_call import KernelCall
from cachetune_store import pinning

MAX_GRAPHS = 96
_INVALIDATED = "due to a previous error during capture"
"""CUDA's message when another thread invalidated a capture."""
_ATTEMPTS = 5
"""How many captures in a row may fail with that message before no more are tried."""

_log = logging.getLogger(__name__)


class CapturedGraphs:
    """The graphs of one model's forwards on one device. They share memory, so only one may be replayed at a time.

    Args:
        device: where the model is.
        enabled: see below.
        recorded: the context of a capture, in which what peers exchange goes through the `Exchange` that it is given.

    Attributes:
        enabled: whether forwards are captured and replayed. It ends where the model turns out to be one that can't be captured.
        captures: how many graphs were captured so far.
    """

    def __init__(
        self, device: torch.device, enabled: bool, recorded: Callable[[Exchange], AbstractContextManager[None]]
    ):
        self._device, self.enabled, self._recorded = device, enabled, recorded
        self.captures = 0
        self._exchange_memory = ExchangeMemory()
        self._graphs: OrderedDict[Kind, Graph] = OrderedDict()
        self._seen: set[Kind] = set()
        self._refused: set[Kind] = set()
        self._disturbed = 0
        self._pool: Any = None
        self._stream: Any = None

    def __contains__(self, kind: Kind) -> bool:
        return kind in self._graphs

    def find(self, kind: Kind) -> Graph | None:
        """The graph that a forward of a kind replays now; None if it runs without one, or captures one first (`wants`)."""
        graph = self._graphs.get(kind) if self.enabled else None
        if graph is not None:
            self._graphs.move_to_end(kind)
        return graph

    def wants(self, kind: Kind) -> bool:
        """Whether a forward of a kind that has no graph should capture one."""
        return self.enabled and kind in self._seen and kind not in self._refused

    def ran(self, kind: Kind) -> None:
        """A forward of a kind has run, or is about to. The first one runs without a graph: it compiles kernels, which a capture can't do."""
        self._seen.add(kind)

    def drop(self) -> None:
        """Forget every graph, as if no forward had run yet."""
        self._graphs.clear()
        self._seen.clear()
        self._pool = None

    def capture(
        self, kind: Kind, inputs: Inputs, run: Callable[[Callable[[int], None]], tuple[Tensor, KernelCall]]
    ) -> Graph | None:
        """Capture a forward.

        Args:
            kind: its kind.
            inputs: what it reads, and its replays.
            run: runs it with what is called before each layer's attention, which cuts the graph; gives its result, and the call of the kernels.

        Returns:
            The graph; None where the capture failed.
        """
        if self._pool is None:
            self._stream = torch.cuda.Stream(self._device)
            self._pool = torch.cuda.graph_pool_handle()
        recorder = Recorder(self._pool, self._exchange_memory)
        # The garbage collector must not run during a capture: freeing page-locked memory, perhaps another engine's, would make it fail.
        collecting = gc.isenabled()
        gc.collect()
        gc.disable()
        torch.cuda.synchronize(self._device)
        # The first forward of this kind ran without a graph. What it took for its results is of no use to the graph, which takes memory of its own.
        torch.cuda.empty_cache()
        try:
            with pinning.capturing(), torch.cuda.stream(self._stream), self._recorded(recorder.exchange):
                recorder.begin()
                try:
                    out, call = run(nothing if kind.whole else recorder.cut)
                finally:
                    recorder.end()
        except RuntimeError as error:
            self._give_up(kind, error)
            return None
        finally:
            if collecting:
                gc.enable()
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        self.captures += 1
        self._disturbed = 0
        total = None if call.probing is None else call.probing.total
        graph = self._graphs[kind] = Graph(inputs, recorder.pieces, out, total)
        while len(self._graphs) > MAX_GRAPHS:
            self._graphs.popitem(last=False)
        return graph

    def _give_up(self, kind: Kind, error: RuntimeError) -> None:
        """After a failed capture: go on without this graph, go on without any, or let the next request try again."""
        torch.cuda.synchronize(self._device)
        if not self._graphs:
            self._pool = None  # a pool without a graph is freed, so the next capture needs another one
        if _out_of_memory(error):
            _log.warning("no memory for a CUDA graph of %d tokens: requests of this size run as they are", kind.tokens)
            self._refused.add(kind)
            torch.cuda.empty_cache()
            return
        self._disturbed += 1
        if _INVALIDATED in str(error) and self._disturbed < _ATTEMPTS:
            # Most likely another thread of the program waited for the device meanwhile.
            _log.warning(
                "a CUDA graph of %d tokens was not captured, the next request tries again: %s", kind.tokens, error
            )
            return
        # A forward that reads numbers from the device, for example to choose experts on the host, can't be captured.
        _log.warning("no CUDA graphs for this model: %s", error)
        self.enabled = False
        self._graphs.clear()


def _out_of_memory(error: BaseException | None) -> bool:
    """Whether this error, or one that caused it, says that the device's memory is full."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return True
        error = error.__cause__ or error.__context__
    return False
