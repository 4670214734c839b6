"""The one object through which an engine uses a model of transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from cachetune_rag.kernels import kernels_run_on
from cachetune_rag.model.cuda import compiled_layers as fusion
from cachetune_rag.model.cuda.device_forward import DeviceForward
from cachetune_rag.model.cuda.steps import ANSWER_ROWS, KernelSteps
from cachetune_rag.model.family import masks, output
from cachetune_rag.model.family.rope import Tables, rows_of
from cachetune_rag.model.family.taps import StopForward, interruptible
from cachetune_rag.model.family.value_cache import ValueCache
from cachetune_rag.model.heads import ALL_HEADS, Heads
from cachetune_rag.model.libraries.neutral import neutral, neutrally
from cachetune_rag.model.opened_model import open_model
from cachetune_rag.model.plain import attention
from cachetune_rag.model.plain.buffers import KVBuffers, ScatterCache
from cachetune_rag.model.plain.capture import ChunkCapture, ChunkKV, LeadInKV
from cachetune_rag.model.plain.probe import Probe, ProbePass
from cachetune_rag.model.plain.shift import ChunkShift, RowShift
from cachetune_store.layout import LayerSpec


@dataclass(frozen=True)
class ModelLayout:
    """What must stay the same of a model while engines use it, even when its weights change."""

    dtype: torch.dtype
    device: str
    layers: tuple[LayerSpec, ...]
    vocabulary: int

    @property
    def description(self) -> str:
        """The layout in words, for messages."""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{dtype} on {self.device}, {len(self.layers)} layers, {self.vocabulary} token ids"


class ModelAdapter:
    """Capture, rotation and forwards of one causal language model, through public interfaces of transformers.

    Args:
        model: a causal language model of transformers, whole on one device. It is not changed: forwards run through a second
            tree of modules over the same weights (`view.view_of`).
        cuda_kernels: run selective forwards through this package's kernels and CUDA graphs where the device supports it
            (docs/gpu.md).
        heads: which of the model's heads are in this process.

    Raises:
        UnsupportedModelError: the architecture can't be served exactly; the message says why.

    Attributes:
        model: the caller's own object.
        view: the adapter's own tree of modules, which forwards run through.
        architecture: its class name, for messages.
        config: the configuration of its text part.
        device, dtype: where its weights are, and the dtype in which it computes.
        attentions, decoder_layers, taps, rotary, model_forward: its parts (see `OpenedModel`).
        layers, num_layers: the shapes of each layer's keys and values in this process, and how many layers there are.
        stored_layers: the shapes of each layer's stored rows, which are those of all heads.
        heads: which of the heads are in this process.
        max_positions: the longest prompt that its configuration allows; None where it names none.
        reuse_beyond: prompts of at most this many tokens must be computed whole (0 for most models). Long-rope models
            use other frequencies for them than for longer prompts, and a chunk's KV is valid for one set of frequencies only.
        cuda_kernels: whether this package's kernels run on the model's GPU.
        device_forward: forwards through the kernels; None where they don't run.
        half_split: by layer, whether the rotation of the `place` kernel is the model's own; empty where no kernels run.

    The methods are not thread-safe: capture and probe register hooks on the adapter's modules while they run, so its user
    holds one lock around every call. Threads that use `model` itself need no lock.
    """

    def __init__(self, model: Any, *, cuda_kernels: bool = True, heads: Heads = ALL_HEADS):
        self.model, self._wants_kernels, self.heads = model, cuda_kernels, heads
        with neutral():
            self._open()

    def renew(self) -> None:
        """Open the model again as it is now, and drop everything that was made from its earlier weights."""
        self.__dict__.pop("value_grams", None)
        with neutral():
            self._open()

    def _open(self) -> None:
        opened = self._opened = open_model(self.model)
        self.architecture, self.view, self.config = opened.architecture, opened.view, opened.config
        self.device, self.dtype = opened.device, opened.dtype
        self.attentions, self.decoder_layers = opened.attentions, opened.decoder_layers
        self.taps, self.layers, self.num_layers = opened.taps, opened.layers, len(opened.layers)
        self.stored_layers = tuple(self.heads.stored(spec) for spec in self.layers)
        self.rotary, self.model_forward = opened.rotary, opened.forward
        self.max_positions: int | None = getattr(self.config, "max_position_embeddings", None)
        self.reuse_beyond = opened.reuse_beyond
        self._capture = ChunkCapture(self.model_forward, self.attentions, self.taps, self.reuse_beyond, self.device)
        self._probe = Probe(
            self.attentions,
            self.decoder_layers,
            self.taps,
            self.layers,
            opened.windows,
            opened.rotary_tables,
            opened.rotate_by,
            self.model_forward.scattered,
            # In half types, the model's fused attention is more exact than weights that are written out.
            lambda: self.dtype == torch.float32 and self.model_forward.wanted_attention() == attention.NAME,
        )
        kernels_run = self._wants_kernels and kernels_run_on(self.device)
        self.cuda_kernels = kernels_run and self.device.type == "cuda"
        self.device_forward = self._make_device_forward() if kernels_run else None
        self.half_split = opened.half_split() if kernels_run else []

    @property
    def layout(self) -> ModelLayout:
        """The layout, which must stay the same when the weights change."""
        return ModelLayout(self.dtype, str(self.device), self.layers, self.config.vocab_size)

    def _make_device_forward(self) -> DeviceForward | None:
        if self.model_forward.wanted_attention() != attention.NAME:
            return None
        mask = masks.placeholder(self.config, self.device)
        return DeviceForward(
            lambda ids, places, cache: self.model_forward.selected(ids, places, mask, cache),
            self.decoder_layers,
            self.layers,
            self._opened.windows,
            self._probe.gains,
            self._opened.turns,
            self.device,
            graphs=self.heads.graphs,
            recorded=self.heads.recorded,
        )

    # -- precompute -----------------------------------------------------------------------------------------------

    @cached_property
    def value_grams(self) -> list[Tensor | None]:
        """By layer: `output.gram` of its output projection; None where no such projection was found."""
        grams: list[Tensor | None] = []
        for module, spec in zip(self.attentions, self.layers, strict=True):
            weight = output.output_heads(module, self.config.num_attention_heads, spec.v_head_dim)
            grams.append(None if weight is None else output.gram(weight, spec.heads))
        return grams

    @neutrally
    def capture(self, chunks: Sequence[Sequence[int]], lead_in: Sequence[int]) -> list[ChunkKV]:
        """See `ChunkCapture.capture`."""
        return self._capture.capture(chunks, lead_in)

    @neutrally
    def lead_kv(self, lead_in: Sequence[int]) -> LeadInKV:
        """See `ChunkCapture.lead_kv`."""
        return self._capture.lead_kv(lead_in)

    @neutrally
    def capture_behind(
        self, chunks: Sequence[Sequence[int]], lead_in: LeadInKV | None, receive: Callable[[int, Tensor, Tensor], None]
    ) -> None:
        """See `ChunkCapture.capture_behind`."""
        self._capture.capture_behind(chunks, lead_in, receive)

    # -- positions ------------------------------------------------------------------------------------------------

    def rotary_tables(self, length: int) -> dict[str | None, Tables]:
        """Cosines and sines of a prompt of `length` tokens, by layer type; each [length, rotary_dim]."""
        return self._opened.rotary_tables(length)

    def rotate(self, layer: int, keys: Tensor, positions: Tensor, tables: dict[str | None, Tables]) -> Tensor:
        """Keys before rotation [tokens, kv_heads, head_dim] -> keys at `positions` [tokens]."""
        return self.rotate_by(layer, keys, rows_of(tables, positions))

    def rotate_by(self, layer: int, keys: Tensor, rows: dict[str | None, Tables]) -> Tensor:
        """Keys before rotation -> keys rotated by `rows` of the tables, one row a token (see `rope.rows_of`)."""
        return self._opened.rotate_by(layer, keys, rows)

    def rotation(self, layer: int, tables: dict[str | None, Tables]) -> Tables | tuple[None, None]:
        """The tables that a layer's keys are rotated by; (None, None) if it doesn't rotate."""
        return tables[self._opened.layer_types[layer]] if self.rotary.rotated[layer] else (None, None)

    def new_buffers(
        self,
        length: int,
        answer_tokens: int = 0,
        memory: Tensor | None = None,
        await_layer: Callable[[int], None] | None = None,
    ) -> KVBuffers:
        """Uninitialised buffers for a prompt of `length` tokens. If decoding writes into them, they have rows for an answer as well.

        Args:
            length: tokens of the prompt.
            answer_tokens: tokens that the answer is expected to have. More are possible: rows are added where they are missing.
            memory, await_layer: see `KVBuffers`; `memory` has `buffer_bytes(length, answer_tokens)` bytes on the device.
        """
        rows = self._answer_rows(answer_tokens)
        return KVBuffers(self.layers, length, self.dtype, self.device, rows, memory, await_layer)

    def buffer_bytes(self, length: int, answer_tokens: int = 0) -> int:
        """Bytes that `new_buffers` take."""
        return sum(self.layer_bytes(length, answer_tokens))

    def layer_bytes(self, length: int, answer_tokens: int = 0) -> list[int]:
        """The same, layer by layer."""
        return KVBuffers.layer_sizes(self.layers, length + self._answer_rows(answer_tokens), self.dtype)

    def _answer_rows(self, answer_tokens: int) -> int:
        return 0 if self.device_forward is None else min(answer_tokens, ANSWER_ROWS)

    @cached_property
    def row_bytes(self) -> int:
        """Bytes that the keys and values of one token take, over all layers."""
        return self.buffer_bytes(1)

    def rows_of_cache(self, cache: Cache, count: int) -> KVBuffers:
        """New buffers with the first `count` rows of a cache."""
        buffers = self.new_buffers(count)
        buffers.take_first(cache)
        return buffers

    # -- forwards -------------------------------------------------------------------------------------------------

    @neutrally
    def full_forward(self, ids: Tensor) -> tuple[Tensor, DynamicCache]:
        """The model's own prefill of `ids` [length]: logits of the last token [1, vocab], and the cache."""
        cache = DynamicCache()
        return self.forward(ids, cache), cache

    @neutrally
    def forward(self, ids: Tensor, cache: Cache, keep: int = 1) -> Tensor:
        """Run `ids` [tokens] behind the tokens of `cache`, and append them to it. Returns logits of the last ones, [keep, vocab]."""
        return self.model_forward.behind(ids, cache, keep)

    def go_on(self, ids: Tensor, cache: Cache) -> Tensor:
        """What `steps` would give behind the last of `ids` [tokens, at least one], one after another, in as few forwards as that takes.

        Long-rope models choose their factors by the longest position that is read at once, so they take two where these tokens pass the
        boundary.
        """
        short = max(0, self.reuse_beyond - cache.get_seq_length())
        *_, logits = (self.forward(part, cache) for part in (ids[:short], ids[short:]) if len(part))
        return logits

    def steps(self, cache: Cache) -> Callable[[int], Tensor]:
        """Decoding steps by the model's own forward: token -> logits behind it, [1, vocab]. Each step appends its token to `cache`."""
        return lambda token: self.forward(torch.tensor([token], device=self.device), cache)

    def quick_steps(self, cache: Cache, buffers: KVBuffers | None, answer_tokens: int) -> Callable[[int], Tensor]:
        """As `steps`, but through the kernels where they run; they don't append to `cache`.

        Args:
            cache: the cache of a prompt.
            buffers: the buffers that the cache is a view of; None where it has memory of its own, which is then moved to new buffers.
            answer_tokens: the expected number of steps; more are possible.
        """
        if self.device_forward is None:
            return self.steps(cache)

        def find() -> KVBuffers:
            if buffers is not None:
                return buffers
            made = self.new_buffers(cache.get_seq_length(), answer_tokens)
            made.take(cache)
            return made

        return KernelSteps(self.device_forward, find, cache)

    def interruptible(self, stop: Callable[[], bool]) -> AbstractContextManager[None]:
        """See `taps.interruptible`."""
        return interruptible(self.attentions, self.device, stop)

    @neutrally
    def warmup(
        self,
        tokens: int,
        probe: tuple[int, bool, int] | None,
        lengths: Sequence[int],
        shift: bool,
        largest: int = 0,
    ) -> None:
        """Compile the model's layers, then see `DeviceForward.warmup`. Does nothing on devices without one."""
        if self.device_forward is None or self.device.type != "cuda":
            return
        if self.max_positions is None or self.max_positions >= fusion.TOKENS:
            self.device_forward.fuse(self.new_buffers(fusion.TOKENS), self.config.vocab_size)
        self.device_forward.warmup(tokens, probe, lengths, shift, largest)

    @neutrally
    def selective_forward(
        self,
        ids: Tensor,
        positions: Tensor,
        buffers: KVBuffers,
        before: Callable[[int], None] | None = None,
        shift: ChunkShift | None = None,
    ) -> Tensor:
        """Run the selected tokens through every layer against the assembled KV.

        Args:
            ids, positions: the selected tokens and their positions, [selected], ascending; the last one is the
                prompt's last token.
            buffers: KV of the prompt; rows at `positions` are overwritten, all other rows of a layer must be there when
                `before(layer)` returns.
            before: called once a layer, before its buffer is used.
            shift: how the reused rows of chunks follow the recomputed ones; they are changed in `buffers`.

        Returns:
            Logits of the last token, [1, vocab].
        """
        if self.device_forward is not None:
            return self.device_forward.forward(ids, positions, buffers, before, shift)
        ids, positions = ids.to(self.device), positions.to(self.device)
        rows = None if shift is None else RowShift(shift, positions, self._opened.turns(buffers.length))
        return self.model_forward.scattered(
            ids, positions, buffers, ScatterCache(buffers, positions, before, shift=rows)
        )

    def fresh_layers(self, layer: int) -> float:
        """The cost of `fresh_states(ids, layer)` for one token, counted in layers."""
        return layer + output.input_share(self.attentions[layer], self.decoder_layers[layer])

    @neutrally
    def fresh_states(self, ids: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Keys (rotated) and values of one layer in full prefill of `ids` [length], of all heads: each [length, kv_heads, dim].

        Runs the layers before it, and its own projections.
        """
        states: list[Tensor] = []

        def receive(number: int, keys: Tensor, values: Tensor) -> None:
            if number == layer:
                states.extend(s[0].transpose(0, 1) for s in (keys, values))
                raise StopForward

        try:
            positions = torch.arange(ids.shape[0], device=self.device)
            self.model_forward.without_head(ids.to(self.device)[None], ValueCache(self.num_layers, receive), positions)
        except StopForward:
            pass
        return self.heads.every(states[0]), self.heads.every(states[1])

    @neutrally
    def received_attention(self, probe: ProbePass) -> Tensor:
        """See `Probe.received`."""
        if self.device_forward is not None:
            return self.heads.mean(self.device_forward.received(probe))
        return self.heads.mean(self._probe.received(probe.on(self.device)))

    @neutrally
    def observe_attention(self, probe: ProbePass, observe: Callable[[int, Tensor], None]) -> None:
        """See `Probe.observe`; `observe` gets the heads of this process."""
        self._probe.observe(probe.on(self.device), observe)

    @neutrally
    def expected_error(self, probe: ProbePass, deviations: Tensor) -> Tensor:
        """See `Probe.expected_error`; `deviations` are those of the heads in this process."""
        deviations, total = deviations.to(self.device), self.heads.total
        if self.device_forward is not None:
            return total(self.device_forward.expected_error(probe, deviations, total))
        return total(self._probe.expected_error(probe.on(self.device), deviations, total))
