"""Checks at load which models can be served. Others are refused by name, with the reason."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from cachetune_rag.errors import UnsupportedModelError
from cachetune_rag.model.family import masks

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ATTENTION_PARTS = ("k_proj", "qkv_proj", "query_key_value", "Wqkv", "c_attn")


def check(model: Any) -> None:
    """Raise UnsupportedModelError for kinds of model that reuse can't be exact for.

    A model that passes is still checked against its own keys before it is served (`LoadCheck`), so an unknown family is
    either served exactly or refused.
    """
    name, config = type(model).__name__, model.config.get_text_config(decoder=True)
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{name} is an encoder-decoder model: its prompt is read by a bidirectional encoder, so every token's keys "
            "depend on the whole prompt. Use a decoder-only model."
        )
    if getattr(config, "kv_lora_rank", None):
        raise UnsupportedModelError(
            f"{name} uses multi-head latent attention (MLA): it keeps a compressed vector and a shared rotated key "
            "per token instead of keys and values per head, which the store has no layout for."
        )
    if getattr(config, "num_kv_shared_layers", 0):
        raise UnsupportedModelError(
            f"{name} shares keys and values between layers (num_kv_shared_layers > 0), which is not built."
        )
    if "mrope_section" in str(getattr(config, "rope_parameters", None)):
        raise UnsupportedModelError(
            f"{name} uses multimodal rotary positions (mrope), which a text prompt's positions don't describe."
        )
    if "'rope_type': 'dynamic'" in str(getattr(config, "rope_parameters", None)):
        raise UnsupportedModelError(
            f"{name} uses dynamic NTK rotary scaling, whose frequencies depend on the longest prompt the process has seen: "
            "even full prefill then depends on earlier requests. Use a static scaling (linear, yarn, llama3)."
        )
    if getattr(config, "use_bidirectional_attention", False) or getattr(config, "is_causal", True) is False:
        raise UnsupportedModelError(f"{name} attends in both directions, so a chunk's keys depend on what follows it.")
    masks.check_layer_types(config, name)
    if (dtype := getattr(model, "dtype", None)) not in _DTYPES:
        raise UnsupportedModelError(
            f"{name} computes in {dtype}, whose keys and values the store has no form for. Load it with dtype=torch.float32, "
            "torch.bfloat16 or torch.float16; a model that was made without one takes torch's default dtype."
        )
    if not hasattr(model, "get_decoder") or not hasattr(model, "generate"):
        raise UnsupportedModelError(
            f"{name} is no causal language model of transformers (it has no get_decoder/generate)."
        )
    devices = {str(p.device) for p in model.parameters()}
    if len(devices) != 1 or "meta" in devices:
        raise UnsupportedModelError(
            f"{name} lies on {', '.join(sorted(devices))}: reuse is built for a model that lies whole on one device. "
            "Load it without device_map, or with device_map naming one device."
        )


def attention_layers(decoder: nn.Module, count: int, architecture: str) -> list[nn.Module]:
    """The attention modules of the decoder, in layer order."""
    found: dict[int, nn.Module] = {}
    for module in decoder.modules():
        number = getattr(module, "layer_idx", None)
        if isinstance(number, int) and any(hasattr(module, part) for part in _ATTENTION_PARTS):
            found[number] = module
    if sorted(found) != list(range(count)):
        raise UnsupportedModelError(
            f"{architecture}: found attention in layers {sorted(found)}, expected one in each of {count} layers. Layers "
            "without attention (state-space, linear attention, convolution) keep a running state that can't be "
            "assembled from chunks."
        )
    return [found[i] for i in range(count)]


def decoder_layers(decoder: nn.Module, attentions: list[nn.Module], architecture: str) -> list[nn.Module]:
    """The decoder layer that contains each attention module. Its input is the residual stream."""
    for stack in decoder.modules():
        if isinstance(stack, nn.ModuleList) and len(stack) == len(attentions):
            pairs = zip(stack, attentions, strict=True)
            if all(any(part is attention for part in layer.modules()) for layer, attention in pairs):
                return list(stack)
    raise UnsupportedModelError(
        f"{architecture}: its attention modules don't stand in a list of {len(attentions)} layers, one in each, so what goes "
        "into a layer can't be read. Please open an issue that names the model."
    )
