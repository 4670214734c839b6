"""How transformers' models are called. Only this file knows the names of arguments, the masks and the attention implementations."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from cachetune_rag.model.family import masks
from cachetune_rag.model.libraries.private import attention_set, sdpa_is_right
from cachetune_rag.model.plain import attention
from cachetune_rag.model.plain.buffers import KVBuffers, ScatterCache


class ModelForward:
    """The forwards of one model, through transformers' public interface.

    Args:
        model: a causal language model of transformers, which only engines run, one at a time (`view.view_of`).
        config: its text config.
        decoder: the model without its language-model head.

    Attributes:
        cache_argument: the name of the model's argument for its cache.
        window: the model's sliding window; None if it has none.

    The caller switches gradients off.
    """

    def __init__(self, model: Any, config: Any, decoder: Any):
        self._model, self._config, self._decoder = model, config, decoder
        self._device, self._dtype = model.device, model.dtype
        # 5.24 renamed the argument; the old name warns there.
        names = inspect.signature(model.forward).parameters
        self.cache_argument = "cache" if "cache" in names else "past_key_values"
        self.window = masks.window_of(config, decoder)

    def behind(self, ids: Tensor, cache: Cache, keep: int) -> Tensor:
        """Run the model on `ids` [tokens] behind the tokens of `cache`. Returns logits of the last ones, [keep, vocab]."""
        start = cache.get_seq_length()
        positions = torch.arange(start, start + ids.shape[0], device=self._device)[None]
        out = self._model(
            input_ids=ids[None],
            position_ids=positions,
            use_cache=True,
            logits_to_keep=keep,
            **{self.cache_argument: cache},
        )
        return out.logits[0, -keep:]

    def without_head(self, ids: Tensor, cache: Cache, positions: Tensor, **options: Any) -> None:
        """Run the decoder on ids [batch, tokens] at `positions` [tokens]."""
        options[self.cache_argument] = cache
        self._decoder(input_ids=ids, position_ids=positions.expand_as(ids), use_cache=True, **options)

    def selected(self, ids: Tensor, positions: Tensor, mask: Any, cache: Cache) -> Tensor:
        """Run the model on some of a prompt's tokens, ids and positions [1, tokens]. Returns logits of the last one, [1, vocab]."""
        with self.masked_attention():
            out = self._model(
                input_ids=ids,
                position_ids=positions,
                attention_mask=mask,
                use_cache=True,
                logits_to_keep=1,
                **{self.cache_argument: cache},
            )
        return out.logits[:, -1]

    def scattered(self, ids: Tensor, positions: Tensor, buffers: KVBuffers, cache: ScatterCache) -> Tensor:
        """As `selected`, for ids and positions [tokens]. Each token sees the rows of `buffers` up to its own position."""
        mask = self.mask(positions, buffers.length)
        with attention.by_position(positions):
            return self.selected(ids[None], positions[None], mask, cache)

    def mask(self, positions: Tensor, length: int) -> Any:
        """The masks, as the model takes them, of queries at `positions` [queries] over keys 0..length-1."""
        return masks.build(self._config, self.window, positions, length, self._dtype)

    @contextmanager
    def masked_attention(self) -> Iterator[None]:
        """While the context is open, the model has an attention implementation that takes a mask by position.

        Eager attention takes such a mask. It is also used in place of kernels for soft-capping and learned sinks, which sdpa can't
        compute.
        """
        current, wanted = attention_set(self._config), self.wanted_attention()
        if current == wanted:
            yield
            return
        try:
            self._model.set_attn_implementation(wanted)
            yield
        finally:
            self._model.set_attn_implementation(current)

    def wanted_attention(self) -> str:
        """The attention implementation of selective forwards."""
        current = attention_set(self._config)
        beyond_sdpa = (
            not sdpa_is_right(self._model) or getattr(self._config, "attn_logit_softcapping", None) is not None
        )
        return "eager" if current == "eager" or (beyond_sdpa and current != "sdpa") else attention.NAME
