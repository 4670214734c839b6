"""Selective forwards on a CUDA device: the package's kernels, replayed as CUDA graphs.

The model's code runs as it is. Its cache and its attention function, which it gets through transformers' public interfaces, are kernels
that find a prompt's buffers through a table of addresses. So a forward depends on the prompt only through the numbers in one small input
tensor. It is captured once for each token count, and replayed from then on. Launching the kernels of 32 layers one by one takes about
50 ms; a replay takes almost no time.

A graph is cut into pieces before each layer's attention, because the layer's reused rows must be there by then. Between the pieces, the
stream waits for the rows. (A decoding step needs no cuts.) Where other processes have some of the heads, it is also cut where they exchange
what they have: that is done between the pieces. Token counts and the order of exchanges are the same with and without graphs, so it doesn't matter whether
all of the processes could capture one. Token counts are rounded up. Padding stands in front, at position -1, where it
reads and writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from cachetune_rag.model.cuda.captured import CapturedGraphs
from cachetune_rag.model.cuda.compiled_layers import TOKENS, FusedLayers, opaque
from cachetune_rag.model.cuda.graphs import (
    MAX_TOKENS,
    STEP,
    Exchange,
    Graph,
    Inputs,
    Kind,
    bucket,
    buckets,
    nothing,
    padded_chunks,
    padded_length,
    shift_numbers,
    shifting_kinds,
)
from cachetune_rag.model.cuda.kernel_call import KernelCache, KernelCall
from cachetune_rag.model.cuda.kernel_calls import KernelCalls
from cachetune_rag.model.cuda.row_lists import RowLists, listing
from cachetune_rag.model.family import taps
from cachetune_rag.model.family.rope import Turn
from cachetune_rag.model.family.taps import StopForward
from cachetune_rag.model.plain.attention import by_kernel
from cachetune_rag.model.plain.buffers import KVBuffers
from cachetune_rag.model.plain.probe import ProbePass
from cachetune_rag.model.plain.shift import ChunkShift
from cachetune_store.layout import LayerSpec

_PROBED_TOKENS = 256
"""Up to this many computed tokens a probe is warmed up. It computes the query, the prefix and what stands between chunks."""

RunModel = Callable[[Tensor, Tensor, Cache], Tensor]
"""Runs the model on ids and positions [1, tokens] with a cache. Gives the logits of the last token, [1, vocab]."""


class DeviceForward:
    """Selective forwards of one model on one device. Only one may run at a time, because the graphs share memory.

    Args:
        run: runs the model with the kernels as its attention function.
        layers: its decoder layers.
        specs: shapes of each layer's keys and values.
        windows: how many keys back each layer sees; None for all.
        gains: calculates `output.gain` of each layer, float32 [heads].
        turns: makes each layer's rotation for a prompt of the given length.
        device: where the model is.
        graphs: whether forwards may be captured as CUDA graphs.
        recorded: the context of a capture, in which what peers exchange goes through the `Exchange` that it is given.
    """

    def __init__(
        self,
        run: RunModel,
        layers: Sequence[nn.Module],
        specs: Sequence[LayerSpec],
        windows: Sequence[int | None],
        gains: Callable[[], list[Tensor]],
        turns: Callable[[int], list[Turn | None]],
        device: torch.device,
        graphs: bool = True,
        recorded: Callable[[Exchange], AbstractContextManager[None]] = lambda _exchange: nullcontext(),
    ):
        self.run_model, self._layers, self._device = run, list(layers), device
        self._num_layers = len(specs)
        self._calls = KernelCalls(specs, windows, gains, turns, device)
        self._fused = FusedLayers(layers)
        self._padded = graphs and device.type == "cuda"
        self._graphs = CapturedGraphs(device, self._padded, recorded)
        self.began: torch.cuda.Event | None = None
        """Recorded on the device when it starts the last forward."""
        self._unread: list[Inputs] = []

    @property
    def graphs_enabled(self) -> bool:
        """Whether forwards are captured as CUDA graphs and replayed."""
        return self._graphs.enabled

    @graphs_enabled.setter
    def graphs_enabled(self, enabled: bool) -> None:
        self._graphs.enabled = enabled

    @property
    def captures(self) -> int:
        """How many graphs were captured so far."""
        return self._graphs.captures

    def forward(
        self,
        ids: Tensor,
        positions: Tensor,
        buffers: KVBuffers,
        before: Callable[[int], None] | None,
        shift: ChunkShift | None = None,
    ) -> Tensor:
        """As `ModelAdapter.selective_forward`. `ids` and `positions` should be on the host, which is fastest."""
        numbers = None if shift is None else shift_numbers(shift, positions, self._calls.rotations(buffers.length))
        kind = Kind(bucket(ids.shape[0]), chunks=0 if numbers is None else padded_chunks(numbers.spans.shape[0]))
        if numbers is None and kind not in self._graphs:
            # A graph that shifts chunks computes the same where no chunk is shifted. Most selectors shift, so a graph without would be one more for each size.
            kind = next((k for k in shifting_kinds(kind) if k in self._graphs), kind)
        return self._go(kind, ids, positions, buffers, before or nothing, shift=numbers)

    def step(self, token: int, place: int, buffers: KVBuffers) -> Tensor:
        """Run the model on one more token, at `place`, whose row `buffers` must have already. Gives logits [1, vocab]."""
        return self._go(STEP, torch.tensor([token]), torch.tensor([place]), buffers, nothing)

    def received(self, probe: ProbePass) -> Tensor:
        """As `ModelAdapter.received_attention`."""
        length, listed = padded_length(probe.buffers.length), None if probe.left_out is None else 0
        return self._watch(
            Kind(bucket(probe.ids.shape[0]), probe.layers, length=length, listed=listed), probe, RowLists(probe)
        )

    def expected_error(
        self, probe: ProbePass, deviations: Tensor, summed: Callable[[Tensor], Tensor] = lambda scores: scores
    ) -> Tensor:
        """As `Probe.expected_error`. `deviations` are on the device, and complete once `before(0)` has returned."""
        columns = self._calls.columns(probe.layers)
        if deviations.shape[1] != columns:
            raise ValueError(f"deviations have {deviations.shape[1]} columns; {probe.layers} layers make {columns}.")
        listed = 0 if probe.left_out is not None else None if probe.shortlist is None else probe.shortlist.after
        length = padded_length(probe.buffers.length)
        kind = Kind(bucket(probe.ids.shape[0]), probe.layers, True, length, listed=listed)
        held = deviations.contiguous()
        return self._watch(kind, probe, RowLists(probe, summed), deviations=held.data_ptr())

    def _watch(self, kind: Kind, probe: ProbePass, lists: RowLists, **numbers: Any) -> Tensor:
        numbers["watched"] = min(probe.queries, probe.ids.shape[0])
        if kind.listed is not None:
            numbers["roles"] = lists.roles
        totals = self._go(kind, probe.ids, probe.positions, probe.buffers, probe.before, lists, **numbers)
        return totals[: probe.buffers.length]

    def fuse(self, buffers: KVBuffers, vocabulary: int) -> bool:
        """Compile the model's layers (`FusedLayers.compile`). They are tried on `buffers` for `compiled_layers.TOKENS` tokens."""
        kind = Kind(TOKENS)
        inputs = Inputs(kind, self._num_layers, self._device)
        inputs.fill(torch.arange(TOKENS) % vocabulary, torch.arange(TOKENS), buffers)
        before = self._fused.ready
        done = self._fused.compile(lambda: self._eager(inputs, nothing, self._calls.make(kind, inputs)))
        if done and not before:
            # Graphs captured before don't contain the compiled layers. Their memory pool is freed with the last of them.
            self.drop_graphs()
        return done

    def drop_graphs(self) -> None:
        """Forget every captured graph, as if no request had been made yet."""
        self._graphs.drop()

    def warmup(
        self,
        tokens: int,
        probe: tuple[int, bool, int] | None = None,
        lengths: Sequence[int] = (),
        shift: bool = False,
        largest: int = 0,
    ) -> None:
        """Compile the kernels and capture the graphs of a decoding step and of up to `tokens` computed tokens.

        Args:
            tokens: the most tokens that a forward computes.
            probe: how many layers a probe runs through, whether it adds up the expected error, and behind how many layers it goes on with
                a shortlist (0: never). Its graphs are captured too, for up to 256 computed tokens.
            lengths: prompt lengths for which the probe is made ready.
            shift: whether forwards shift chunks.
            largest: the most tokens that a forward is expected to compute, where these are more than `tokens`. For so many there is a graph from then on, whose memory those
                of all smaller sizes share. Of the sizes between, the kernels are compiled, and the first forward captures the graph.
        """
        # The largest first: graphs share memory, and a later one has no use for several smaller pieces of it.
        sizes = buckets(max(tokens, largest))
        for size in reversed(sizes):
            kind = Kind(size, chunks=padded_chunks(int(shift)))
            self._warm(kind, capture=size == sizes[-1] or size <= bucket(tokens))
        self._warm(STEP)
        if probe is not None:
            layers, errors, after = probe
            for length in sorted({padded_length(n) for n in lengths}, reverse=True):
                for size in reversed(buckets(min(tokens, _PROBED_TOKENS))):
                    # Short prompts and large ratios have no shortlist; where a prompt has new passages, every layer uses a list.
                    for each in dict.fromkeys((None, after or None, 0)):
                        self._warm(Kind(size, layers, errors, length, listed=each))
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _warm(self, kind: Kind, capture: bool = True) -> None:
        if kind in self._graphs:
            return
        inputs = Inputs(kind, self._num_layers, self._device)
        inputs.fill_idle()
        self._keep(inputs)
        self._eager(inputs, nothing, self._calls.make(kind, inputs))
        self._graphs.ran(kind)
        if capture and self.graphs_enabled and kind.tokens <= MAX_TOKENS:
            self._capture(kind)

    def _go(
        self,
        kind: Kind,
        ids: Tensor,
        positions: Tensor,
        buffers: KVBuffers,
        before: Callable[[int], None],
        lists: RowLists | None = None,
        **numbers: Any,
    ) -> Tensor:
        """Run a forward of a kind. `lists` writes which rows its layers use, if they don't use all."""
        graph = None
        if self._padded and kind.tokens <= MAX_TOKENS:
            graph = self._graphs.find(kind)
            if graph is None and self._graphs.wants(kind):
                graph = self._capture(kind)
            self._graphs.ran(kind)
        else:
            # Padding only serves to share graphs. (Where a capture failed, others who have a part of the model may go on with theirs.)
            shift = numbers.get("shift")
            chunks = 0 if shift is None else shift.spans.shape[0]
            length = buffers.length if kind.length else 0
            kind = Kind(ids.shape[0], kind.probed, kind.errors, length, chunks, kind.listed)
        if graph is not None:
            graph.inputs.fill(ids, positions, buffers, **numbers)
            self.began = graph.inputs.read
            return graph.replay(listing(before, kind, lists, graph.inputs, graph.total))
        inputs = Inputs(kind, self._num_layers, self._device)
        inputs.fill(ids, positions, buffers, **numbers)
        self._keep(inputs)
        self.began = inputs.read
        call = self._calls.make(kind, inputs)
        total = None if call.probing is None else call.probing.total
        return self._eager(inputs, listing(before, kind, lists, inputs, total), call)

    def _keep(self, inputs: Inputs) -> None:
        """Keep inputs until the device has read them. Their page-locked memory is read by a kernel, of which torch doesn't know: it would
        hand the memory out again at once."""
        self._unread = [*(each for each in self._unread if each.read is not None and not each.read.query()), inputs]

    def _eager(self, inputs: Inputs, before: Callable[[int], None], call: KernelCall) -> Tensor:
        """Run the model on `inputs` without a graph. Gives the logits, or what a probe has added up."""
        cache = (opaque_cache() if self._fused.ready else KernelCache)(call, before)
        with by_kernel(call), self._running(call):
            try:
                logits = self.run_model(inputs.ids, inputs.places, cache)
            except StopForward:
                assert call.probing is not None
                return call.probing.total.sum(0)
        return logits

    def _running(self, call: KernelCall) -> Any:
        """The context in which the model runs. It enters the compiled layers, and watches the layers' inputs where a probe needs them."""
        see = call.see_input if call.watches_inputs else None
        if self._fused.ready or see is None:
            return self._fused.active(see)
        return taps.inputs_tapped(self._layers, see)

    def _capture(self, kind: Kind) -> Graph | None:
        inputs = Inputs(kind, self._num_layers, self._device)
        inputs.fill_idle()
        self._calls.make(kind, inputs)  # makes cached values here, which must not be made during the capture

        def run(before: Callable[[int], None]) -> tuple[Tensor, KernelCall]:
            call = self._calls.make(kind, inputs)
            return self._eager(inputs, before, call), call

        return self._graphs.capture(kind, inputs, run)


@cache
def opaque_cache() -> type[KernelCache]:
    """A `KernelCache` whose `update` compiled code calls without compiling it.

    It is a class of its own, because setting the method on an object would make the object, and with it a prompt's buffers, part of a
    reference cycle. Gigabytes would stay until Python's garbage collector runs.
    """
    return type("OpaqueKernelCache", (KernelCache,), {"update": opaque(KernelCache.update)})
