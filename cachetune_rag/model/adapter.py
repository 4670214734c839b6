"""One object for all the engine asks of a transformers model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from cachetune_rag.errors import UnsupportedModelError
from cachetune_rag.kernels import kernels_run_on
from cachetune_rag.model.cuda import compiled_layers as fusion
from cachetune_rag.model.cuda.device_forward import DeviceForward
from cachetune_rag.model.cuda.steps import ROOM, KernelSteps
from cachetune_rag.model.family import families, masks, output, taps
from cachetune_rag.model.family.rope import Rotary, Tables, Turn, longrope_boundary, rows_of
from cachetune_rag.model.family.taps import StopForward, interruptible
from cachetune_rag.model.family.value_cache import ValueCache
from cachetune_rag.model.libraries.neutral import neutral, neutrally
from cachetune_rag.model.loaded.view import unwrapped, view_of
from cachetune_rag.model.plain import attention
from cachetune_rag.model.plain.buffers import KVBuffers, ScatterCache
from cachetune_rag.model.plain.capture import ChunkCapture, ChunkKV, LeadKV
from cachetune_rag.model.plain.forward import ModelForward
from cachetune_rag.model.plain.loadcheck import LoadCheck
from cachetune_rag.model.plain.probe import Probe
from cachetune_rag.model.plain.shift import ChunkShift, RowShift
from cachetune_store.layout import LayerSpec


@dataclass(frozen=True)
class ModelLayout:
    """What has to stay the same of a model while an engine is on it, whatever its weights are."""

    dtype: torch.dtype
    device: str
    layers: tuple[LayerSpec, ...]
    vocabulary: int

    @property
    def told(self) -> str:
        """In words."""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{dtype} on {self.device}, {len(self.layers)} layers, {self.vocabulary} token ids"


class ModelAdapter:
    """Capture, rotation and forwards of one causal language model, through transformers' public surface.

    Args:
        model: a causal LM of transformers, whole on one device. It stays as it is: forwards go through a tree of modules of the
            adapter's own over the same weights (`view.view_of`).
        cuda_kernels: run selective forwards through this package's kernels and CUDA graphs, on a device that can (docs/gpu.md).

    Raises:
        UnsupportedModelError: the architecture can't be served exactly; the message says why.

    Attributes:
        model: the caller's.
        view: what forwards go through.
        reuse_beyond: prompts of at most so many tokens have to be computed whole (0 for most models); long-rope models
            use other frequencies for them than for longer ones, and a chunk's KV is valid under one set only.

    The methods are not thread-safe: capture and probe hook into the adapter's modules while they run, so the caller
    holds one lock around every use of the adapter. The caller of the model needs none.
    """

    def __init__(self, model: Any, *, cuda_kernels: bool = True):
        self.model, self._cuda_kernels = model, cuda_kernels
        with neutral():
            self._open()

    def renew(self) -> None:
        """Take the model as it is now: drop all that was made of its weights before."""
        self.__dict__.pop("value_grams", None)
        with neutral():
            self._open()

    def _open(self) -> None:
        given = unwrapped(self.model)
        self.architecture = type(given).__name__
        families.check(given)
        self.view = model = view_of(given)
        cuda_kernels = self._cuda_kernels
        self.config = model.config.get_text_config(decoder=True)
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.dtype
        self.num_layers: int = self.config.num_hidden_layers
        self.max_positions: int | None = getattr(self.config, "max_position_embeddings", None)
        self._decoder = model.get_decoder()
        self._attentions = families.attention_layers(self._decoder, self.num_layers, self.architecture)
        layer_types = list(getattr(self.config, "layer_types", None) or [None] * self.num_layers)
        self._layer_types: list[str | None] = layer_types
        self._rotary = Rotary(self._decoder, self._attentions, layer_types, self.architecture)
        self._forward = ModelForward(model, self.config, self._decoder)
        self.reuse_beyond: int = longrope_boundary(self.config)
        self._windows = [masks.window_at(self._forward.window, kind) for kind in layer_types]
        cuda_kernels = cuda_kernels and kernels_run_on(self.device)
        self.cuda_kernels = cuda_kernels and self.device.type == "cuda"
        self.device_forward: DeviceForward | None = None
        self._taps, self.layers = self._check()
        self._capture = ChunkCapture(self._forward, self._attentions, self._taps, self.reuse_beyond, self.device)
        self._decoder_layers = families.decoder_layers(self._decoder, self._attentions, self.architecture)
        self._probe = Probe(
            self._attentions,
            self._decoder_layers,
            self._taps,
            self.layers,
            self._windows,
            self.rotary_tables,
            self.rotate_by,
            self._forward.scattered,
            # In half types, fused attention is more exact than what could be shown.
            lambda: self.dtype == torch.float32 and self._forward.wanted_attention() == attention.NAME,
        )
        self.device_forward = self._device_forward() if cuda_kernels else None
        """Forwards through the kernels; None where they don't run."""
        self.half_split = self._half_split() if cuda_kernels else []
        """By layer: whether the `place` kernel's rotation is the model's own; empty where the kernels aren't used."""

    @property
    def layout(self) -> ModelLayout:
        """What a prompt's KV looks like."""
        return ModelLayout(self.dtype, str(self.device), self.layers, self.config.vocab_size)

    def _half_split(self) -> list[bool]:
        tables = self.rotary_tables(64)
        return [
            self._rotary.half_split(i, *tables[self._layer_types[i]], spec.heads, spec.head_dim)
            for i, spec in enumerate(self.layers)
        ]

    def _device_forward(self) -> DeviceForward | None:
        if self._forward.wanted_attention() != attention.NAME:
            return None
        mask = masks.placeholder(self.config, self.device)
        return DeviceForward(
            lambda ids, places, cache: self._forward.selected(ids, places, mask, cache),
            self._decoder_layers,
            self.layers,
            self._windows,
            self._probe.gains,
            self._turns,
            self.device,
        )

    def _check(self) -> tuple[list[taps.Tap], tuple[LayerSpec, ...]]:
        """Find the taps and try a selective forward; whatever an unknown architecture trips over is a refusal."""
        try:
            check = LoadCheck(
                self.architecture,
                self.config,
                self._attentions,
                self._layer_types,
                self._rotary,
                self._forward.without_head,
            )
            self._taps, self.layers = check.run(self.device, self.rotary_tables)
            ids = torch.arange(3, device=self.device)
            self.selective_forward(ids, ids, self.new_buffers(3))
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as e:
            raise UnsupportedModelError(
                f"{self.architecture}: its attention can't be run through the calls that reuse needs "
                f"({type(e).__name__}: {e}). Please open an issue that names the model."
            ) from e
        return self._taps, self.layers

    # -- precompute -----------------------------------------------------------------------------------------------

    @cached_property
    def value_grams(self) -> list[Tensor | None]:
        """By layer: `output.gram` of its output projection; None where there is none to be found."""
        grams: list[Tensor | None] = []
        for module, spec in zip(self._attentions, self.layers, strict=True):
            weight = output.output_heads(module, self.config.num_attention_heads, spec.v_head_dim)
            grams.append(None if weight is None else output.gram(weight, spec.heads))
        return grams

    @neutrally
    def capture(self, chunks: Sequence[Sequence[int]], lead_in: Sequence[int]) -> list[ChunkKV]:
        """See `ChunkCapture.capture`."""
        return self._capture.capture(chunks, lead_in)

    @neutrally
    def lead_kv(self, lead_in: Sequence[int]) -> LeadKV:
        """See `ChunkCapture.lead_kv`."""
        return self._capture.lead_kv(lead_in)

    @neutrally
    def capture_behind(
        self, chunks: Sequence[Sequence[int]], lead: LeadKV | None, receive: Callable[[int, Tensor, Tensor], None]
    ) -> None:
        """See `ChunkCapture.capture_behind`."""
        self._capture.capture_behind(chunks, lead, receive)

    # -- positions ------------------------------------------------------------------------------------------------

    def rotary_tables(self, length: int) -> dict[str | None, Tables]:
        """Cosines and sines of a prompt of `length` tokens, by layer type; each [length, rotary_dim]."""
        return self._rotary.tables(length, next(self._decoder.parameters()).new_empty(0, dtype=self.dtype))

    def rotate(self, layer: int, keys: Tensor, positions: Tensor, tables: dict[str | None, Tables]) -> Tensor:
        """Keys before rotation [tokens, kv_heads, head_dim] -> keys at `positions` [tokens]."""
        return self.rotate_by(layer, keys, rows_of(tables, positions))

    def rotate_by(self, layer: int, keys: Tensor, rows: dict[str | None, Tables]) -> Tensor:
        """Keys before rotation -> rotated by `rows` of the tables, one a token (see `rows_of`)."""
        if not self._rotary.rotated[layer]:
            return keys
        cos, sin = rows[self._layer_types[layer]]
        return self._rotary.rotate(layer, keys, cos, sin)

    def rotation(self, layer: int, tables: dict[str | None, Tables]) -> Tables | tuple[None, None]:
        """The tables that a layer's keys are rotated by; (None, None) if it doesn't rotate."""
        return tables[self._layer_types[layer]] if self._rotary.rotated[layer] else (None, None)

    def _turns(self, length: int) -> list[Turn | None]:
        """See `Rotary.turns`; for prompts of `length` tokens."""
        return self._rotary.turns(self.rotary_tables(length), [spec.head_dim for spec in self.layers])

    def new_buffers(self, length: int, room: int = 0) -> KVBuffers:
        """Uninitialised buffers for a prompt of `length` tokens; where decoding needs it, with room for an answer of `room`."""
        room = 0 if self.device_forward is None else min(room, ROOM)
        return KVBuffers(self.layers, length, self.dtype, self.device, room)

    @cached_property
    def row_bytes(self) -> int:
        """What the keys and values of a token take, over all layers."""
        return self.new_buffers(0).row_bytes

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
        """Run `ids` [tokens] behind what `cache` holds, which grows by them. Returns logits of the last ones, [keep, vocab]."""
        return self._forward.behind(ids, cache, keep)

    def steps(self, cache: Cache) -> Callable[[int], Tensor]:
        """Decoding steps by transformers' own forward: token -> logits behind it, [1, vocab]. `cache` grows."""
        return lambda token: self.forward(torch.tensor([token], device=self.device), cache)

    def quick_steps(self, cache: Cache, buffers: KVBuffers | None, room: int) -> Callable[[int], Tensor]:
        """As `steps`, but through the kernels where they run; `cache` stays as it is.

        Args:
            cache: of a prompt.
            buffers: the memory that it shows; None where it has memory of its own, from which it is moved.
            room: how many steps to expect; there may be more.
        """
        if self.device_forward is None:
            return self.steps(cache)

        def find() -> KVBuffers:
            if buffers is not None:
                return buffers
            made = self.new_buffers(cache.get_seq_length(), room)
            made.take(cache)
            return made

        return KernelSteps(self.device_forward, find, cache)

    def interruptible(self, stop: Callable[[], bool]) -> AbstractContextManager[None]:
        """See `taps.interruptible`."""
        return interruptible(self._attentions, self.device, stop)

    @neutrally
    def warmup(self, tokens: int, probe: tuple[int, bool] | None, lengths: Sequence[int], shift: bool) -> None:
        """Compile the model's layers and see `DeviceForward.warmup`; nothing to do without one."""
        if self.device_forward is None or self.device.type != "cuda":
            return
        if self.max_positions is None or self.max_positions >= fusion.TOKENS:
            self.device_forward.fuse(self.new_buffers(fusion.TOKENS), self.config.vocab_size)
        self.device_forward.warmup(tokens, probe, lengths, shift)

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
            ids, positions: the selected tokens and their places, [selected], ascending; the last one is the
                prompt's last token.
            buffers: KV of the prompt; rows at `positions` are overwritten, all others must be there when
                `before(layer)` has returned.
            before: called once a layer, before its buffer is used.
            shift: how the reused rows of chunks follow the recomputed ones; they are changed in `buffers`.

        Returns:
            Logits of the last token, [1, vocab].
        """
        if self.device_forward is not None:
            return self.device_forward.forward(ids, positions, buffers, before, shift)
        ids, positions = ids.to(self.device), positions.to(self.device)
        rows = None if shift is None else RowShift(shift, positions, self._turns(buffers.length))
        return self._forward.scattered(ids, positions, buffers, ScatterCache(buffers, positions, before, shift=rows))

    def fresh_layers(self, layer: int) -> float:
        """What `fresh_states` of a layer costs a token, in layers."""
        return layer + output.input_share(self._attentions[layer], self._decoder_layers[layer])

    @neutrally
    def fresh_states(self, ids: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Keys (rotated) and values of one layer in full prefill of `ids` [length]: each [length, kv_heads, dim].

        The layers before it are run, and its own projections.
        """
        states: list[Tensor] = []

        def receive(number: int, keys: Tensor, values: Tensor) -> None:
            if number == layer:
                states.extend(s[0].transpose(0, 1) for s in (keys, values))
                raise StopForward

        try:
            positions = torch.arange(ids.shape[0], device=self.device)
            self._forward.without_head(ids.to(self.device)[None], ValueCache(self.num_layers, receive), positions)
        except StopForward:
            pass
        return states[0], states[1]

    @neutrally
    def received_attention(
        self,
        ids: Tensor,
        positions: Tensor,
        buffers: KVBuffers,
        num_layers: int,
        queries: int,
        before: Callable[[int], None],
    ) -> Tensor:
        """See `Probe.received`."""
        if self.device_forward is not None:
            return self.device_forward.received(ids, positions, buffers, num_layers, queries, before)
        ids, positions = ids.to(self.device), positions.to(self.device)
        return self._probe.received(ids, positions, buffers, num_layers, queries, before)

    @neutrally
    def observe_attention(
        self,
        ids: Tensor,
        positions: Tensor,
        buffers: KVBuffers,
        num_layers: int,
        queries: int,
        before: Callable[[int], None],
        observe: Callable[[int, Tensor], None],
    ) -> None:
        """See `Probe.observe`."""
        ids, positions = ids.to(self.device), positions.to(self.device)
        self._probe.observe(ids, positions, buffers, num_layers, queries, before, observe)

    @neutrally
    def expected_error(
        self,
        ids: Tensor,
        positions: Tensor,
        buffers: KVBuffers,
        deviations: Tensor,
        num_layers: int,
        queries: int,
        before: Callable[[int], None],
    ) -> Tensor:
        """See `Probe.expected_error`."""
        deviations = deviations.to(self.device)
        if self.device_forward is not None:
            return self.device_forward.expected_error(ids, positions, buffers, deviations, num_layers, queries, before)
        ids, positions = ids.to(self.device), positions.to(self.device)
        return self._probe.expected_error(ids, positions, buffers, deviations, num_layers, queries, before)
