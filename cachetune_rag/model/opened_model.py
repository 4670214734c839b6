"""A causal language model of transformers, taken apart into what reuse needs of it, and checked."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cachetune_rag.errors import UnsupportedModelError
from cachetune_rag.model.family import families, masks, taps
from cachetune_rag.model.family.rope import Rotary, Tables, Turn, longrope_boundary
from cachetune_rag.model.loaded.view import unwrapped, view_of
from cachetune_rag.model.plain.buffers import KVBuffers, ScatterCache
from cachetune_rag.model.plain.forward import ModelForward
from cachetune_rag.model.plain.loadcheck import LoadCheck
from cachetune_store.layout import LayerSpec


@dataclass(eq=False)
class OpenedModel:
    """The parts of one model. `open_model` makes it.

    Attributes:
        architecture: the model's class name, for messages.
        view: a second tree of modules over the caller's weights; all forwards run through it (see `view.view_of`).
        config: the configuration of its text part.
        decoder: the view without its language-model head.
        attentions: the attention module of each layer.
        layer_types: the type of each layer; None where the configuration names no types.
        rotary: its rotary positions.
        forward: how it is called.
        decoder_layers: the decoder layer that contains each attention module.
        taps: where the keys and queries of each layer are read before their rotation.
        layers: the shapes of each layer's keys and values.
    """

    architecture: str
    view: Any
    config: Any
    decoder: Any
    attentions: list[nn.Module]
    layer_types: list[str | None]
    rotary: Rotary
    forward: ModelForward
    decoder_layers: list[nn.Module] = field(init=False)
    taps: list[taps.Tap] = field(init=False)
    layers: tuple[LayerSpec, ...] = field(init=False)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self.view.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which it computes."""
        dtype: torch.dtype = self.view.dtype
        return dtype

    @property
    def reuse_beyond(self) -> int:
        """See `ModelAdapter`."""
        return longrope_boundary(self.config)

    @property
    def windows(self) -> list[int | None]:
        """How many keys back a token sees in each layer, itself included; None for all."""
        return [masks.window_at(self.forward.window, kind) for kind in self.layer_types]

    def rotary_tables(self, length: int) -> dict[str | None, Tables]:
        """Cosines and sines of a prompt of `length` tokens, by layer type; each [length, rotary_dim]."""
        return self.rotary.tables(length, next(self.decoder.parameters()).new_empty(0, dtype=self.dtype))

    def rotate_by(self, layer: int, keys: Tensor, rows: dict[str | None, Tables]) -> Tensor:
        """Keys before rotation -> keys rotated by `rows` of the tables, one row a token (see `rope.rows_of`)."""
        if not self.rotary.rotated[layer]:
            return keys
        cos, sin = rows[self.layer_types[layer]]
        return self.rotary.rotate(layer, keys, cos, sin)

    def turns(self, length: int) -> list[Turn | None]:
        """The rotation of each layer for prompts of `length` tokens (see `Rotary.turns`)."""
        return self.rotary.turns(self.rotary_tables(length), [spec.head_dim for spec in self.layers])

    def half_split(self) -> list[bool]:
        """By layer: whether the rotation of the `place` kernel is the model's own, bit for bit."""
        tables = self.rotary_tables(64)
        return [
            self.rotary.half_split(i, *tables[self.layer_types[i]], spec.heads, spec.head_dim)
            for i, spec in enumerate(self.layers)
        ]


def open_model(model: Any) -> OpenedModel:
    """Take a model apart, and check that reuse is exact for it.

    Raises:
        UnsupportedModelError: the architecture can't be served exactly; the message says why.
    """
    given = unwrapped(model)
    architecture = type(given).__name__
    families.check(given)
    view = view_of(given)
    config, decoder = view.config.get_text_config(decoder=True), view.get_decoder()
    count: int = config.num_hidden_layers
    attentions = families.attention_layers(decoder, count, architecture)
    layer_types: list[str | None] = list(getattr(config, "layer_types", None) or [None] * count)
    opened = OpenedModel(
        architecture=architecture,
        view=view,
        config=config,
        decoder=decoder,
        attentions=attentions,
        layer_types=layer_types,
        rotary=Rotary(decoder, attentions, layer_types, architecture),
        forward=ModelForward(view, config, decoder),
    )
    _check(opened)
    opened.decoder_layers = families.decoder_layers(decoder, attentions, architecture)
    return opened


def _check(opened: OpenedModel) -> None:
    """Find the taps, and try a selective forward. Any error that an unknown architecture causes here refuses the model."""
    check = LoadCheck(
        opened.architecture,
        opened.config,
        opened.attentions,
        opened.layer_types,
        opened.rotary,
        opened.forward.without_head,
    )
    try:
        opened.taps, opened.layers = check.check(opened.device, opened.rotary_tables)
        ids = torch.arange(3, device=opened.device)
        buffers = KVBuffers(opened.layers, len(ids), opened.dtype, opened.device)
        opened.forward.scattered(ids, ids, buffers, ScatterCache(buffers, ids))
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as e:
        raise UnsupportedModelError(
            f"{opened.architecture}: its attention can't be run through the calls that reuse needs "
            f"({type(e).__name__}: {e}). Please open an issue that names the model."
        ) from e
