"""The check at load: whether keys that this package rotates equal the keys that the model puts into its cache.

So an unknown family is either served exactly or refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from cachetune_rag.errors import UnsupportedModelError
from cachetune_rag.model.family import taps
from cachetune_rag.model.family.rope import Rotary, Tables
from cachetune_rag.model.family.value_cache import ValueCache
from cachetune_store.layout import LayerSpec

# By how many positions the check moves the tokens, and how much rounding alone may change keys that are not rotated (relative).
_SHIFT, _NOISE = 64, 0.2


class LoadCheck:
    """Runs a few tokens through a model, and compares the keys before and after its rotation.

    Args:
        architecture: the model's class name, for messages.
        config: its text config.
        attentions: the attention module of each layer.
        layer_types: the types of the layers; None if the config names none.
        rotary: its rotation.
        run_decoder: runs ids [1, tokens] with a cache at positions [tokens].
    """

    def __init__(
        self,
        architecture: str,
        config: Any,
        attentions: list[nn.Module],
        layer_types: Sequence[str | None],
        rotary: Rotary,
        run_decoder: Callable[[Tensor, Cache, Tensor], None],
    ):
        self._architecture, self._config, self._attentions = architecture, config, attentions
        self._layer_types, self._rotary, self._run_decoder = layer_types, rotary, run_decoder

    @torch.no_grad()
    def check(
        self, device: torch.device, tables_of: Callable[[int], dict[str | None, Tables]]
    ) -> tuple[list[taps.Tap], tuple[LayerSpec, ...]]:
        """Compare each layer's tapped and rotated keys with the keys the model hands to its cache.

        This finds the submodule that returns the keys before rotation, the layout of its output, and the layers that rotate
        (it sets `Rotary.rotated`).

        Args:
            device: where the model is.
            tables_of: rotary tables of a prompt of so many tokens.
        """
        heads = self._config.num_attention_heads
        # The length differs from the numbers of heads, so that a wrong layout can't fit by accident.
        kv_heads = getattr(self._config, "num_key_value_heads", None) or heads
        length = next(n for n in (11, 13, 17) if n not in (heads, kv_heads))
        ids = torch.arange(length, device=device)[None] * 7919 % self._config.vocab_size
        cached, outputs = self._observe(ids, start=0)
        moved, _ = self._observe(ids, start=_SHIFT)

        found, specs = [], []
        tables = tables_of(length)
        for layer, module in enumerate(self._attentions):
            if layer not in cached:
                raise UnsupportedModelError(f"{self._architecture}: layer {layer} wrote nothing to the cache.")
            keys, values = cached[layer]
            specs.append(LayerSpec(keys.shape[1], keys.shape[3], values.shape[3]))
            shape = taps.HeadShape(heads, keys.shape[1], keys.shape[3])
            found.append(self._match(layer, module, shape, outputs[layer], keys[0].transpose(0, 1), tables))
            # Keys that are normalised after their rotation can look like unrotated ones, but they change with the position.
            if not self._rotary.rotated[layer] and _distance(keys, moved[layer][0]) > _NOISE:
                raise UnsupportedModelError(
                    f"{self._architecture}: layer {layer} ({type(module).__name__}) changes its keys after it has rotated "
                    "them (a norm after the rotary embedding), so stored keys can't be moved to another position."
                )
            if not self._rotary.comes_apart(layer, *tables[self._layer_types[layer]], specs[-1].head_dim):
                raise UnsupportedModelError(
                    f"{self._architecture}: layer {layer} ({type(module).__name__}) doesn't turn its keys' channels in pairs by "
                    "the model's tables, so a change of keys can't be carried from one position to another. Please open an "
                    "issue that names the model."
                )
        return found, tuple(specs)

    def _observe(self, ids: Tensor, start: int) -> tuple[dict[int, tuple[Tensor, Tensor]], list[dict[str, Tensor]]]:
        """What each layer caches, and what its submodules return, with `ids` at positions `start`, `start` + 1, ..."""
        cached: dict[int, tuple[Tensor, Tensor]] = {}
        outputs: list[dict[str, Tensor]] = [{} for _ in self._attentions]
        handles = []

        def receive(layer: int, keys: Tensor, values: Tensor) -> None:
            if layer in cached:
                raise UnsupportedModelError(
                    f"{self._architecture}: layer {layer} runs more than once a token (looped layers), so a token has "
                    "several keys a layer, which the store has no layout for."
                )
            cached[layer] = (keys, values)

        for layer, module in enumerate(self._attentions):
            for name, part in module.named_children():

                def hook(_m: Any, _a: Any, out: Any, layer: int = layer, name: str = name) -> None:
                    outputs[layer][name] = out

                handles.append(part.register_forward_hook(hook))
        try:
            positions = torch.arange(start, start + ids.shape[1], device=ids.device)
            self._run_decoder(ids, ValueCache(len(self._attentions), receive), positions)
        finally:
            for handle in handles:
                handle.remove()
        return cached, outputs

    def _match(
        self,
        layer: int,
        attention: Any,
        shape: taps.HeadShape,
        outputs: dict[str, Tensor],
        cached: Tensor,
        tables: dict[str | None, Tables],
    ) -> taps.Tap:
        cos, sin = tables[self._layer_types[layer]]
        for rotated in (True, False):
            self._rotary.rotated[layer] = rotated
            tap = taps.first_matching(
                taps.candidates(attention, shape),
                outputs,
                lambda keys: torch.equal(self._rotary.rotate(layer, keys[0], cos, sin), cached),
            )
            if tap is not None:
                return tap
        raise UnsupportedModelError(
            f"{self._architecture}: the keys that layer {layer} ({type(attention).__name__}) caches are not its projected "
            "keys rotated by the model's own function, so stored keys could not be placed exactly. Families known to "
            "work are listed in the README; please open an issue that names the model."
        )


def _distance(a: Tensor, b: Tensor) -> float:
    """Relative distance of two tensors of one shape."""
    return float((a - b).float().norm() / a.float().norm().clamp_min(1e-12))
