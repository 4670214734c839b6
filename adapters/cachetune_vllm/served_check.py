"""The check at start: does the model over vLLM's weights compute what vLLM computes?

Both run a few tokens with their attention left out (its result is taken to be zero): then each layer is compared by what
goes into its attention, and the whole model by its logits. So a model is refused at start if a weight was mixed up, rows are in another
order, or the rotation or a scale differs, also in model families that nobody has tried. Keys and values that agree here are also in the
form that belongs into vLLM's pages.

What goes into a layer is vLLM's own for both, wherever what the layer before has added is nearly the same: otherwise differences in rounding would add up, and in
deep models with 8-bit numbers hide an error. (Quantised layers round what goes into them to 8 bits, so a difference in the last bit of a 16-bit number becomes one of a whole step, in every
layer anew: with 8-bit floats, the queries of layer 6 of a random model of 32 layers and 4,096 channels were 0.11 apart on an H200.)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cachetune_rag.errors import UnsupportedModelError
from cachetune_rag.model.libraries.neutral import neutral
from cachetune_rag.model.loaded.view import view_of
from cachetune_vllm.logs import logger
from cachetune_vllm.served_model import ServedModel

_log = logger(__name__)
_TOKENS = 24
_ATTENTION = "cachetune_left_out"
_TOLERANCE = {torch.float32: 1e-3}
_HALF = 0.1
"""The tolerance for 16-bit types: the two implementations round differently. A real error differs by about 1."""
_ADDED = 2
"""What a layer adds may be so many times as far apart, since it comes out of several products."""


@dataclass(frozen=True)
class _Seen:
    """What went into one layer's attention: query, key and value as [tokens, heads * dim], and its settings."""

    states: tuple[Tensor, Tensor, Tensor]
    scale: float | None
    softcap: float | None


def check_served(vllm_model: nn.Module, served: ServedModel, vllm_config: Any) -> int:
    """Refuse a model that doesn't compute what vLLM's does. To be called before vLLM answers its first request.

    Args:
        vllm_model: the model as vLLM loaded it.
        served: what was made of it.
        vllm_config: vLLM's configuration.

    Returns:
        Behind how many layers both went on with vLLM's numbers. With 0, the log says what could not be compared.

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
    name, bound = type(model).__name__, _TOLERANCE.get(model.dtype, _HALF)
    theirs, their_logits, came_out = _theirs(vllm_model, ids, positions, vllm_config)
    ours, our_logits, led = _ours(model, ids, positions, came_out, bound)
    if len(ours) != len(theirs):
        raise UnsupportedModelError(f"{name} has {len(ours)} attention layers, vLLM's model {len(theirs)}: {_ADVICE}")
    if not led:
        compared = "queries, keys and values" + (
            " of every layer, and the logits" if their_logits is not None else " of every layer"
        )
        _log.warning(_NONE_ALONE, name, len(ours), compared)
    for layer, (own, other) in enumerate(zip(ours, theirs, strict=True)):
        for what, a, b in zip(("queries", "keys", "values"), own.states, other.states, strict=True):
            _compare(f"{name}: the {what} of layer {layer}", a, b, bound)
        for what, one, two in (("scale", own.scale, other.scale), ("soft cap", own.softcap, other.softcap)):
            if abs((one or 0.0) - (two or 0.0)) > 1e-4 * abs(two or 1.0):
                raise UnsupportedModelError(
                    f"{name}: the attention of layer {layer} has {what} {one} in transformers and {two} in vLLM: {_ADVICE}"
                )
        # Where none does, the two are compared from the beginning to the end, which the log says.
        if led and layer not in led:
            raise UnsupportedModelError(
                f"{name}: what layer {layer} adds differs between transformers' code and vLLM's: {_ADVICE}"
            )
    if their_logits is not None:
        _compare(f"{name}: the logits", our_logits, their_logits[:, : our_logits.shape[1]], bound)
    return len(led)


_NONE_ALONE = (
    "%s: the check at start could not compare its %d layers one by one, because none of vLLM's gives the same as transformers'. That is so where vLLM divides the "
    "model into layers at other places. Compared instead, from the model's beginning to its end: %s. Differences in rounding add up on the way. So with many layers or "
    "8-bit numbers, this check may refuse a model that is right, and may not see a small error."
)
_ADVICE = (
    "reuse would not be exact. Requests are answered by vLLM alone without the connector; please open an issue that names the model and "
    "how vLLM was started."
)


def _compare(what: str, ours: Tensor, theirs: Tensor, bound: float) -> None:
    if ours.shape != theirs.shape:
        raise UnsupportedModelError(
            f"{what} are {tuple(ours.shape)} in transformers and {tuple(theirs.shape)} in vLLM: {_ADVICE}"
        )
    off = _apart(ours, theirs)
    if not off <= bound:
        raise UnsupportedModelError(
            f"{what} differ between transformers' code and vLLM's by {off:.2g} (at most {bound:g}): {_ADVICE}"
        )


def _size(numbers: Tensor) -> float:
    return float(numbers.float().norm())


def _apart(some: Tensor, others: Tensor) -> float:
    return _size(some.float() - others.float()) / max(_size(others), 1e-12)


def _ours(
    model: Any, ids: Tensor, positions: Tensor, came_out: Sequence[Sequence[Tensor]], bound: float
) -> tuple[list[_Seen], Tensor, list[int]]:
    """What transformers' code computes, each layer behind what came out of vLLM's (`_layers_heard`), where that is nearly the same; and behind which it is."""
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
        with _layers_led(view.get_decoder(), came_out, bound) as led:
            out = view(input_ids=ids[None], position_ids=positions[None], use_cache=False)
    return seen, out.logits[0], led


@contextmanager
def _layers_led(decoder: Any, came_out: Sequence[Sequence[Tensor]], bound: float) -> Iterator[list[int]]:
    """While open, what comes out of each layer is replaced by what came out of vLLM's, if what the layer has added differs by no more than the bound, and by what the
    numbers' steps make of it where that is little beside what went in. Gives the numbers of the layers of which it was."""
    led: list[int] = []

    def lead(number: int, candidates: Sequence[Tensor]) -> Callable[..., Any]:
        def hook(layer: nn.Module, given: tuple[Any, ...], named: Mapping[str, Any], found: Any) -> Any:
            went_in = given[0] if given else named["hidden_states"]
            states = found[0] if isinstance(found, tuple) else found
            near = [each.view_as(states) for each in candidates if each.numel() == states.numel()]
            best = min(near, key=lambda each: _apart(states, each), default=None)
            if best is None:
                return found
            added, step = _size(best - went_in), torch.finfo(states.dtype).eps / 2
            if not _size(states - best) <= _ADDED * bound * added + step * _size(best):
                return found
            led.append(number)
            return (best, *found[1:]) if isinstance(found, tuple) else best

        return hook

    layers = getattr(decoder, "layers", ())
    # A model whose layers are others than vLLM's is compared from its beginning to its end.
    pairs = zip(layers, came_out, strict=True) if len(layers) == len(came_out) else ()
    hooks = [
        layer.register_forward_hook(lead(number, candidates), with_kwargs=True)
        for number, (layer, candidates) in enumerate(pairs)
    ]
    try:
        yield led
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _layers_heard(vllm_model: nn.Module, came_out: list[list[Tensor]]) -> Iterator[None]:
    """While open, notes what comes out of each of vLLM's layers. Many keep what was added last apart from the rest, some say the rest again: the sum is among the
    candidates, and each alone."""

    def hook(layer: nn.Module, given: Any, found: Any) -> None:
        parts = [part.clone() for part in (found if isinstance(found, tuple) else (found,)) if isinstance(part, Tensor)]
        if len(parts) == 2 and parts[0].shape == parts[1].shape:
            parts.append((parts[0].float() + parts[1].float()).to(parts[0].dtype))
        came_out.append(parts)

    hooks = [layer.register_forward_hook(hook) for layer in _layers_around_attention(vllm_model)]
    try:
        yield
    finally:
        for each in hooks:
            each.remove()


def _layers_around_attention(vllm_model: nn.Module) -> list[nn.Module]:
    """The numbered modules that vLLM's attention layers stand in, in order."""
    from vllm.model_executor.layers.attention import Attention

    modules = dict(vllm_model.named_modules())
    found = [
        re.match(r"(?:.*?\.)?\d+(?=\.)", name) for name, module in modules.items() if isinstance(module, Attention)
    ]
    return [modules[name] for name in dict.fromkeys(match.group() for match in found if match)]


def _theirs(
    vllm_model: Any, ids: Tensor, positions: Tensor, vllm_config: Any
) -> tuple[list[_Seen], Tensor | None, list[list[Tensor]]]:
    """What vLLM's code computes, and what comes out of its layers. Of several processes that share the model, only one has the logits."""
    from vllm.config import set_current_vllm_config
    from vllm.forward_context import set_forward_context

    seen: list[_Seen] = []
    came_out: list[list[Tensor]] = []
    if (adapters := getattr(vllm_model, "lora_manager", None)) is not None:
        from vllm.lora.layers import LoRAMapping

        # With --enable-lora, vLLM says before each forward which adapter each token has: none.
        adapters.set_adapter_mapping(LoRAMapping((0,) * _TOKENS, (0,) * _TOKENS, is_prefill=True))
    with (
        torch.inference_mode(),
        set_current_vllm_config(vllm_config),
        set_forward_context(None, vllm_config, num_tokens=_TOKENS, skip_compiled=True),
        _attention_left_out(vllm_model, seen),
        _layers_heard(vllm_model, came_out),
    ):
        hidden = vllm_model(input_ids=ids, positions=positions, intermediate_tensors=None, inputs_embeds=None)
        logits = vllm_model.compute_logits(hidden)
    return seen, logits, came_out


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
