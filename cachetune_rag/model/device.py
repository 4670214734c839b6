"""Selective forwards on a CUDA device: own kernels, replayed as CUDA graphs.

The model's code runs as it is. Its cache and its attention function, both handed to it through transformers' public
interfaces, are kernels that find a prompt's buffers through a table of addresses. So nothing that a forward does depends on
the prompt but the numbers in one small input tensor, and the whole of it can be captured once per token count and replayed:
an eager forward of 32 layers costs some 50 ms of launches, a replay next to nothing.

A graph is cut before each layer's attention, where the layer's reused rows must have arrived: between the pieces, the stream
waits for them. Token counts are rounded up; padding stands in front, at position -1, where it sees and writes nothing.
"""

from __future__ import annotations

import gc
import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from cachetune_rag.kernels import AddressTable
from cachetune_rag.model.attention import KernelCall, StopForward, by_kernel
from cachetune_rag.model.buffers import KVBuffers
from cachetune_rag.model.fusion import TOKENS, FusedLayers, opaque
from cachetune_store.layout import LayerSpec

MAX_GRAPH_TOKENS = 3072
"""Above, a layer computes for longer than it takes to launch, and a graph would only hold memory."""
MAX_GRAPHS = 64
_MASS_ROOMS = (8192, 32768, 131072)
"""Rooms for the attention that each token receives: few, so that prompts of many lengths share their graphs."""

_log = logging.getLogger(__name__)

RunModel = Callable[[Tensor, Tensor, Cache], Tensor]
"""Runs the model on ids and positions [1, tokens] with a cache; logits of the last token [1, vocab]."""


def bucket(tokens: int) -> int:
    """The token count that `tokens` is padded to: matrix products work in tiles of this size anyway."""
    step = 64 if tokens <= 1536 else 128
    return -(-tokens // step) * step


class DeviceForward:
    """Selective forwards of one model on one device.

    Args:
        run: runs the model with the kernels' attention in place.
        specs: shapes of each layer's keys and values.
        windows: how many keys back each layer sees; None for all.
        device: where the model is.
        fused: its decoder layers.

    One forward at a time: the graphs share their memory.
    """

    def __init__(
        self,
        run: RunModel,
        specs: Sequence[LayerSpec],
        windows: Sequence[int | None],
        device: torch.device,
        fused: FusedLayers,
    ):
        self._run, self._specs, self._windows, self._device = run, list(specs), list(windows), device
        self._fused = fused
        self.graphs_enabled = device.type == "cuda"
        self.captures = 0
        self._graphs: OrderedDict[Any, _Graph] = OrderedDict()
        self._seen: set[Any] = set()
        self._pool: Any = None
        self._stream: Any = None
        # Page-locked numbers that the device may not have read yet: a request has two forwards at most.
        self._recent: deque[_Inputs] = deque(maxlen=4)

    def forward(
        self, ids: Tensor, positions: Tensor, buffers: KVBuffers, before: Callable[[int], None] | None
    ) -> Tensor:
        """As `ModelAdapter.selective_forward`; `ids` and `positions` on the host are cheapest."""
        return self._go(ids, positions, buffers, before or _nothing, None, 0)

    def received(
        self,
        ids: Tensor,
        positions: Tensor,
        buffers: KVBuffers,
        num_layers: int,
        queries: int,
        before: Callable[[int], None],
    ) -> Tensor:
        """As `ModelAdapter.received_attention`."""
        return self._go(ids, positions, buffers, before, num_layers, queries)[: buffers.length]

    def fuse(self, buffers: KVBuffers, vocabulary: int) -> bool:
        """Compile the model's layers (`FusedLayers.compile`), trying them on `buffers` of `fusion.TOKENS` tokens."""
        inputs = _Inputs(TOKENS, len(self._specs), self._device)
        inputs.fill(torch.arange(TOKENS) % vocabulary, torch.arange(TOKENS), buffers)
        done = self._fused.compile(lambda: self._eager(inputs, _nothing, self._call(inputs, TOKENS, None, 0)))
        if done:
            # Captured before, they don't hold what was compiled. Without graphs their memory pool is gone as well.
            self._graphs.clear()
            self._seen.clear()
            self._pool = None
        return done

    def warmup(self, tokens: int, probe: tuple[int, int] | None = None, lengths: Sequence[int] = ()) -> None:
        """Compile the kernels and capture the graphs of up to `tokens` computed tokens.

        Args:
            tokens: most tokens that a forward computes.
            probe: layers and queries of a probe; its graphs are captured too, for up to 256 tokens.
            lengths: prompt lengths that the probe is made ready for.
        """
        for size in _buckets(tokens):
            self._warm(size, 1, None, 0)
        if probe is not None:
            for length in {_mass_room(n): n for n in lengths}.values():
                for size in _buckets(min(tokens, 256)):
                    self._warm(size, length, *probe)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _warm(self, size: int, length: int, layers: int | None, queries: int) -> None:
        key = self._key(size, length, layers, queries)
        if key in self._graphs:
            return
        inputs = _Inputs(size, len(self._specs), self._device)
        inputs.fill_idle()
        self._eager(inputs, _nothing, self._call(inputs, length, layers, queries))
        self._seen.add(key)
        if self.graphs_enabled and size <= MAX_GRAPH_TOKENS:
            self._capture(key, size, length, layers, queries)

    def _go(
        self,
        ids: Tensor,
        positions: Tensor,
        buffers: KVBuffers,
        before: Callable[[int], None],
        layers: int | None,
        queries: int,
    ) -> Tensor:
        tokens = ids.shape[0]
        size = bucket(tokens)
        key = self._key(size, buffers.length, layers, queries)
        graph = None
        if self.graphs_enabled and size <= MAX_GRAPH_TOKENS:
            graph = self._graphs.get(key)
            # The first request of its size runs as it is, which also compiles what a capture could not.
            if graph is None and key in self._seen:
                graph = self._capture(key, size, buffers.length, layers, queries)
            self._seen.add(key)
        if graph is not None:
            self._graphs.move_to_end(key)
            graph.inputs.fill(ids, positions, buffers)
            return graph.replay(before)
        inputs = _Inputs(tokens, len(self._specs), self._device)
        inputs.fill(ids, positions, buffers)
        self._recent.append(inputs)
        return self._eager(inputs, before, self._call(inputs, buffers.length, layers, queries))

    def _key(self, size: int, length: int, layers: int | None, queries: int) -> tuple[Any, ...]:
        return (size, layers, queries, None if layers is None else _mass_room(length))

    def _call(self, inputs: _Inputs, length: int, layers: int | None, queries: int) -> KernelCall:
        call = KernelCall(inputs.table, inputs.positions, self._specs, self._windows)
        if layers is not None:
            call.mass = torch.zeros(_mass_room(length), dtype=torch.float32, device=self._device)
            call.queries, call.last_layer = queries, layers - 1
        return call

    def _eager(self, inputs: _Inputs, before: Callable[[int], None], call: KernelCall) -> Tensor:
        """The model on `inputs`: logits, or the attention received where `call` asks for it."""
        cache = KernelCache(call, before)
        if self._fused.ready:
            cache.update = opaque(cache.update)  # type: ignore[method-assign]
        with by_kernel(call), self._fused.active():
            try:
                logits = self._run(inputs.ids, inputs.places, cache)
            except StopForward:
                assert call.mass is not None
                return call.mass
        return logits

    def _capture(self, key: Any, size: int, length: int, layers: int | None, queries: int) -> _Graph | None:
        if self._pool is None:
            self._stream = torch.cuda.Stream(self._device)
            self._pool = torch.cuda.graph_pool_handle()
        inputs = _Inputs(size, len(self._specs), self._device)
        inputs.fill_idle()
        recorder = _Recorder(self._pool)
        # What the collector frees on the way (another engine's page-locked memory, say) would end the capture.
        collecting = gc.isenabled()
        gc.collect()
        gc.disable()
        torch.cuda.synchronize(self._device)
        try:
            with torch.cuda.stream(self._stream):
                recorder.begin()
                try:
                    call = self._call(inputs, length, layers, queries)
                    out = self._eager(inputs, lambda _layer: recorder.cut(), call)
                finally:
                    recorder.end()
        except RuntimeError as error:
            # Models whose forward asks the device for numbers (experts chosen on the host) run as they are.
            _log.info("no CUDA graphs for this model: %s", error, exc_info=True)
            self.graphs_enabled = False
            self._graphs.clear()
            torch.cuda.synchronize(self._device)
            return None
        finally:
            if collecting:
                gc.enable()
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        self.captures += 1
        graph = self._graphs[key] = _Graph(inputs, recorder.pieces, out)
        while len(self._graphs) > MAX_GRAPHS:
            self._graphs.popitem(last=False)
        return graph


class KernelCache(Cache):
    """Cache of a forward through the kernels: fresh keys and values go to the buffers that the call's table names."""

    def __init__(self, call: KernelCall, before: Callable[[int], None]):
        super().__init__(layers=[_KernelLayer(call, i, before) for i in range(len(call.specs))])

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """See `_KernelLayer.update`."""
        return self.layers[layer_idx].update(key_states, value_states)


class _KernelLayer(CacheLayerMixin):
    is_sliding = False

    def __init__(self, call: KernelCall, layer: int, before: Callable[[int], None]):
        super().__init__()
        self._call, self._layer, self._before = call, layer, before

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Scatter [1, kv_heads, tokens, head_dim]. What is returned only passes through: attention reads the buffers."""
        self._before(self._layer)
        self._call.scatter(self._layer, key_states, value_states)
        return key_states, value_states

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the buffers exist."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Of no consequence: there is no mask."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """No tokens came before: positions are explicit."""
        return 0

    def get_max_length(self) -> int:
        """Not bounded here."""
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.24


class _Inputs:
    """All that tells one forward from another: token ids, places, positions and buffer addresses, in one tensor."""

    def __init__(self, tokens: int, layers: int, device: torch.device):
        self.tokens = tokens
        count = 3 * tokens + 2 * layers
        self._host = torch.zeros(count, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._device = device
        self._read = torch.cuda.Event() if device.type == "cuda" else None
        self._numbers = numbers = torch.zeros(count, dtype=torch.int64, device=device)
        self.ids, self.places = numbers[None, :tokens], numbers[None, tokens : 2 * tokens]
        self.positions, self.table = numbers[2 * tokens : 3 * tokens], numbers[3 * tokens :]

    def fill(self, ids: Tensor, positions: Tensor, buffers: KVBuffers) -> None:
        """Write a request's numbers."""
        if self._read is not None:
            self._read.synchronize()  # the last ones have been read long ago, unless nobody waited for that forward
        size, host = self.tokens, self._host
        padding = size - ids.shape[0]
        host[padding:size] = ids
        host[:padding] = 0
        host[size + padding : 2 * size] = positions
        host[size : size + padding] = 0
        host[2 * size + padding : 3 * size] = positions
        host[2 * size : 2 * size + padding] = -1
        host[3 * size :] = torch.tensor(AddressTable.of(buffers.key_rows, buffers.value_rows))
        self._send()

    def fill_idle(self) -> None:
        """Padding alone: a forward that touches no buffer."""
        self._host.zero_()
        self._host[2 * self.tokens : 3 * self.tokens] = -1
        self._send()

    def _send(self) -> None:
        if self._read is not None:
            from cachetune_rag.kernels.rows import fetch

            fetch(self._host, self._numbers)
            self._read.record()
        else:
            self._numbers.copy_(self._host)


class _Graph:
    """A captured forward: its inputs, its pieces in order, and the tensor its last piece leaves the result in."""

    def __init__(self, inputs: _Inputs, pieces: list[Any], out: Tensor):
        self.inputs, self._pieces, self._out = inputs, pieces, out

    def replay(self, before: Callable[[int], None]) -> Tensor:
        """Run it; `before(layer)` is called between the pieces. The result is the caller's own."""
        for number, piece in enumerate(self._pieces):
            if number:
                before(number - 1)
            piece.replay()
        return self._out.clone()


class _Recorder:
    """Captures a stretch of work as several graphs that share one memory pool and run in order."""

    def __init__(self, pool: Any):
        self._pool, self._open = pool, False
        self.pieces: list[Any] = []

    def begin(self) -> None:
        self.pieces.append(torch.cuda.CUDAGraph())
        # Other threads may go on using the device, reading chunks into page-locked memory for instance.
        self.pieces[-1].capture_begin(pool=self._pool, capture_error_mode="thread_local")
        self._open = True

    def cut(self) -> None:
        self.end()
        self.begin()

    def end(self) -> None:
        if self._open:
            self._open = False
            self.pieces[-1].capture_end()


def _buckets(tokens: int) -> list[int]:
    """Every size that up to `tokens` tokens are padded to, and that has a graph."""
    return sorted({bucket(n) for n in range(64, min(bucket(tokens), MAX_GRAPH_TOKENS) + 1, 64)})


def _mass_room(length: int) -> int:
    return next((room for room in _MASS_ROOMS if room >= length), length)


def _nothing(_layer: int) -> None:
    pass
