"""The check at start: does the model over vLLM's weights compute what vLLM computes?

Both run a few tokens with their attention left out (its result is taken to be zero): then each layer is compared by what
goes into its attention, and the whole model by its logits. So a model is refused at start if a weight was mixed up, rows are in another
order, or the rotation or a scale differs, also in model families that nobody has tried. Keys and values that agree here are also in the
form that belongs into vLLM's pages.

Quantised layers round what goes into them to 8 bits, so a difference in the last bit of a 16-bit number may become one of a whole step, in every layer
anew. How far that moves such a model is measured at its own embeddings, and the two codes may be as far apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cachetune_rag.errors import UnsupportedModelError
from cachetune_rag.model.libraries.neutral import neutral
from cachetune_rag.model.loaded.view import view_of
from cachetune_vllm.served_model import ServedModel

_TOKENS = 24
_ATTENTION = "cachetune_left_out"
_TOLERANCE = {torch.float32: 1e-3}
_HALF = 0.1
"""The tolerance for 16-bit types: the two implementations round differently, layer by layer. A real error differs by about 1."""
_OF_ROUNDING = 2.0
"""Where vLLM's own modules multiply: so many times as far as the model's results are moved by another rounding of its embeddings, they may differ. With weights
and inputs of 8-bit floats, the queries of layer 6 of a random model of 32 layers and 4,096 channels differed by 0.11 on an H200; a plain copy of both codes at a quarter of the
width gives 0.11 there and 0.26 in the last layer, and another rounding moves these by 0.13 and 0.31."""
_MOST = 0.7
"""But never further than that."""


@dataclass(frozen=True)
class _Seen:
    """What went into one layer's attention: query, key and value as [tokens, heads * dim], and its settings."""

    states: tuple[Tensor, Tensor, Tensor]
    scale: float | None
    softcap: float | None


def check_served(vllm_model: nn.Module, served: ServedModel, vllm_config: Any) -> None:
    """Refuse a model that doesn't compute what vLLM's does. To be called before vLLM answers its first request.

    Args:
        vllm_model: the model as vLLM loaded it.
        served: what was made of it.
        vllm_config: vLLM's configuration.

    Raises:
        UnsupportedModelError: says where the two differ first.
    """
    model = served.model
    device = model.device
    vocabulary: int = model.config.get_text_config(decoder=True).vocab_size
    ids = torch.arange(_TOKENS, device=device) * 7919 % vocabulary
    # Spread over the whole context, so that a difference in rotation shows.
    step = max(1, (int(vllm_config.model_config.max_model_len) - 1) // _TOKENS)
    positions = torch.arange(_TOKENS, device=device) * step
    ours, our_logits = _ours(model, ids, positions)
    theirs, their_logits = _theirs(vllm_model, ids, positions, vllm_config)
    name, bound = type(model).__name__, _TOLERANCE.get(model.dtype, _HALF)
    # Of several processes that share a model, all run this, or none: its layers exchange what they have.
    moved, moved_logits = _ours(model, ids, positions, rounded=True) if served.packed else (ours, our_logits)
    if len(ours) != len(theirs):
        raise UnsupportedModelError(f"{name} has {len(ours)} attention layers, vLLM's model {len(theirs)}: {_ADVICE}")
    for layer, (own, other, also) in enumerate(zip(ours, theirs, moved, strict=True)):
        for what, a, b, c in zip(("queries", "keys", "values"), own.states, other.states, also.states, strict=True):
            _compare(f"{name}: the {what} of layer {layer}", a, b, c, bound)
        for what, one, two in (("scale", own.scale, other.scale), ("soft cap", own.softcap, other.softcap)):
            if abs((one or 0.0) - (two or 0.0)) > 1e-4 * abs(two or 1.0):
                raise UnsupportedModelError(
                    f"{name}: the attention of layer {layer} has {what} {one} in transformers and {two} in vLLM: {_ADVICE}"
                )
    if their_logits is not None:
        _compare(f"{name}: the logits", our_logits, their_logits[:, : our_logits.shape[1]], moved_logits, bound)


_ADVICE = (
    "reuse would not be exact. Requests are answered by vLLM alone without the connector; please open an issue that names the model and "
    "how vLLM was started."
)


def _compare(what: str, ours: Tensor, theirs: Tensor, moved: Tensor, bound: float) -> None:
    """Refuse numbers that are further apart than the bound, and than another rounding explains, which has `moved` ours."""
    if ours.shape != theirs.shape:
        raise UnsupportedModelError(
            f"{what} are {tuple(ours.shape)} in transformers and {tuple(theirs.shape)} in vLLM: {_ADVICE}"
        )
    off, most = _apart(ours, theirs), max(bound, min(_MOST, _OF_ROUNDING * _apart(moved, ours)))
    if not off <= most:
        raise UnsupportedModelError(
            f"{what} differ between transformers' code and vLLM's by {off:.2g} (at most {most:.2g}): {_ADVICE}"
        )


def _apart(some: Tensor, others: Tensor) -> float:
    return float((some.float() - others.float()).norm() / others.float().norm().clamp_min(1e-12))


def _ours(model: Any, ids: Tensor, positions: Tensor, *, rounded: bool = False) -> tuple[list[_Seen], Tensor]:
    """What transformers' code computes; with `rounded`, of embeddings that differ by as much as rounding them may."""
    from transformers import AttentionInterface

    seen: list[_Seen] = []

    def left_out(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: Any = None, **more: Any
    ) -> tuple[Tensor, None]:
        states = tuple(s[0].transpose(0, 1).flatten(1) for s in (query, key, value))
        scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        seen.append(_Seen(states, scale, more.get("softcap")))  # type: ignore[arg-type]
        return value.new_zeros(1, query.shape[2], query.shape[1], value.shape[3]), None

    AttentionInterface.register(_ATTENTION, left_out)
    with neutral():
        view = view_of(model)
        view.set_attn_implementation(_ATTENTION)
        with _embeddings_rounded(view) if rounded else nullcontext():
            out = view(input_ids=ids[None], position_ids=positions[None], use_cache=False)
    return seen, out.logits[0]


@contextmanager
def _embeddings_rounded(view: Any) -> Iterator[None]:
    """While open, each number of a model's embeddings is up to half a step of its type larger or smaller."""

    def hook(module: nn.Module, given: Any, found: Tensor) -> Tensor:
        share = torch.rand(found.shape, generator=torch.Generator().manual_seed(0)).to(found.device) - 0.5
        return (found.float() * (1 + torch.finfo(found.dtype).eps * share)).to(found.dtype)

    hooked = view.get_input_embeddings().register_forward_hook(hook)
    try:
        yield
    finally:
        hooked.remove()


def _theirs(vllm_model: Any, ids: Tensor, positions: Tensor, vllm_config: Any) -> tuple[list[_Seen], Tensor | None]:
    """Of several processes that share the model, only one has the logits."""
    from vllm.config import set_current_vllm_config
    from vllm.forward_context import set_forward_context

    seen: list[_Seen] = []
    if (adapters := getattr(vllm_model, "lora_manager", None)) is not None:
        from vllm.lora.layers import LoRAMapping

        # With --enable-lora, vLLM says before each forward which adapter each token has: none.
        adapters.set_adapter_mapping(LoRAMapping((0,) * _TOKENS, (0,) * _TOKENS, is_prefill=True))
    with (
        torch.inference_mode(),
        set_current_vllm_config(vllm_config),
        set_forward_context(None, vllm_config, num_tokens=_TOKENS, skip_compiled=True),
        _attention_left_out(vllm_model, seen),
    ):
        hidden = vllm_model(input_ids=ids, positions=positions, intermediate_tensors=None, inputs_embeds=None)
        logits = vllm_model.compute_logits(hidden)
    return seen, logits


@contextmanager
def _attention_left_out(vllm_model: nn.Module, seen: list[_Seen]) -> Iterator[None]:
    """While open, vLLM's attention layers give zeros, and what goes into them is noted."""
    from vllm.model_executor.layers.attention import Attention

    layers: list[Any] = [module for module in vllm_model.modules() if isinstance(module, Attention)]

    def instead(layer: Any) -> Any:
        def forward(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
            states = tuple(s.reshape(_TOKENS, -1).clone() for s in (query, key, value))
            softcap = getattr(layer.impl, "logits_soft_cap", None)
            seen.append(_Seen(states, float(layer.impl.scale), softcap or None))  # type: ignore[arg-type]
            return query.new_zeros(_TOKENS, layer.num_heads * layer.head_size_v)

        return forward

    try:
        for layer in layers:
            layer.forward = instead(layer)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)
