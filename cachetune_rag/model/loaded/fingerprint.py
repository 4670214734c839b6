"""Fingerprints of a model and of a tokenizer, which are part of every chunk key.

A stored chunk is only valid for the weights that made it. A hub revision doesn't identify these (there are local folders, merged adapters
and quantised copies), so the weights themselves are hashed, on the device where they are.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from cachetune_rag.errors import UnsupportedModelError
from cachetune_rag.model.loaded.changes import adapters_of
from cachetune_rag.model.loaded.foreign import foreign_layers
from cachetune_rag.model.loaded.view import unwrapped

_BLOCK = 1 << 22
"""Weights between two steps of a checksum. It decides what the sum comes to, so it stays as it is."""

_PART = 1 << 18
"""Weights that are summed at once on a CPU: few enough that what is computed of them stays in its caches, enough for some threads."""

# Settings that keys and values don't depend on: they say how a forward is run, or what is generated.
_IRRELEVANT = {
    "_name_or_path", "_commit_hash", "transformers_version", "torch_dtype", "dtype", "_attn_implementation", "use_cache",
    "_attn_implementation_internal", "output_attentions", "output_hidden_states", "return_dict", "bos_token_id",
    "eos_token_id", "pad_token_id", "id2label", "label2id", "problem_type", "chunk_size_feed_forward",
}  # fmt: skip


def model_fingerprint(model: Any) -> str:
    """SHA-256 (hex) over architecture, configuration, and every weight and buffer that is saved with the model.

    Of each weight, the bits are summed as integers (mod 2^64), with odd factors that depend on their place. Such a sum changes with any
    weight, reads memory once, and is the same on every device.

    Raises:
        UnsupportedModelError: some of the weights aren't in the model (`ForeignLinear`), so they can't be read.
    """
    model = unwrapped(model)
    if foreign := foreign_layers(model):
        raise UnsupportedModelError(
            f"{type(model).__name__}: the weights of {foreign[0]} and {len(foreign) - 1} other layers lie outside of the model, so what "
            "identifies them can't be computed. Give the engine their fingerprint: that of the checkpoint which they were loaded from."
        )
    weights = [
        (name, tensor) for name, tensor in sorted(model.state_dict().items()) if isinstance(tensor, torch.Tensor)
    ]
    return fingerprint_of(type(model).__name__, model.config, weights, list(adapters_of(model)))


def fingerprint_of(
    architecture: str, config: Any, weights: Iterable[tuple[str, Tensor]], adapters: list[Any] | None = None
) -> str:
    """`model_fingerprint` of a model of that class and configuration with these weights, in the order of their names."""
    digest = hashlib.sha256()
    settings = {k: v for k, v in config.get_text_config(decoder=True).to_dict().items() if k not in _IRRELEVANT}
    digest.update(json.dumps([architecture, settings], sort_keys=True, default=str).encode())
    checksum = _Checksum()
    for name, tensor in weights:
        digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|{checksum.of(tensor)}\n".encode())
    # Weights of all adapters are among them; which of them are active decides what the model computes.
    if adapters:
        digest.update(repr(adapters).encode())
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 (hex) over all of a tokenizer that decides a content's tokens.

    What a call leaves behind in it (truncation, padding) isn't: content is tokenised with neither. Nor is a padding token that
    was set after the tokenizer was made, which content never becomes. The tokenizer itself is left as it is.
    """
    pad = _later_pad_token(tokenizer)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        if backend.truncation is not None or backend.padding is not None:
            backend = copy.deepcopy(backend)
            backend.no_truncation()
            backend.no_padding()
        definition = backend.to_str() if pad is None else _without_token(backend, pad)
    else:
        vocabulary = {token: i for token, i in tokenizer.get_vocab().items() if token != pad}
        named = tokenizer.special_tokens_map
        if named.get("pad_token") != getattr(tokenizer, "init_kwargs", {}).get("pad_token"):
            named = {name: token for name, token in named.items() if name != "pad_token"}
        definition = json.dumps([sorted(vocabulary.items()), str(named)])
    return hashlib.sha256(f"{type(tokenizer).__name__}|{definition}".encode()).hexdigest()


def _later_pad_token(tokenizer: Any) -> str | None:
    """The padding token, if it was added to the vocabulary after the tokenizer was made: behind all others."""
    pad = getattr(tokenizer, "pad_token", None)
    if pad is None or getattr(tokenizer, "init_kwargs", {}).get("pad_token") is not None:
        return None
    added = tokenizer.added_tokens_decoder
    last = max(added, default=-1)
    behind = last == max(tokenizer.get_vocab().values()) and last > min(added)
    return str(pad) if behind and str(added[last]) == str(pad) else None


def _without_token(backend: Any, literal: str) -> str:
    """The backend's definition as it was before this token was added."""
    definition = json.loads(backend.to_str())
    definition["added_tokens"] = [token for token in definition["added_tokens"] if token["content"] != literal]
    return str(type(backend).from_str(json.dumps(definition)).to_str())


class _Checksum:
    """Checksums of tensors, and the factors that these share."""

    def __init__(self) -> None:
        self._tables: dict[torch.device, Tensor] = {}

    @torch.no_grad()
    def of(self, tensor: Tensor) -> int:
        """Sum over elements of bits * odd(place), mod 2^64, as a signed integer."""
        flat = tensor.detach().contiguous().reshape(-1)
        width = flat.element_size()
        bits = (
            flat.view(torch.uint8)
            if flat.dtype == torch.bool or width == 1
            else flat.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[width])
        )
        total = torch.zeros((), dtype=torch.int64, device=flat.device)
        factors = self._factors(min(_BLOCK, bits.numel()), flat.device)
        at_once = _PART if flat.device.type == "cpu" else _BLOCK
        for block, start in enumerate(range(0, bits.numel(), _BLOCK)):
            part = bits[start : start + _BLOCK]
            total = total * 6364136223846793005 + block
            # The order of summing doesn't matter mod 2^64.
            for few, theirs in zip(part.split(at_once), factors[: part.numel()].split(at_once), strict=True):
                total += (few * theirs).sum()
        return int(total.item())

    def _factors(self, count: int, device: torch.device) -> Tensor:
        """At least `count` factors, made once for all tensors that need no more."""
        table = self._tables.get(device)
        if table is None or table.numel() < count:
            starts = range(0, count, _PART)
            table = torch.cat([_factors(start, min(_PART, count - start), device) for start in starts or [0]])
            self._tables[device] = table
        return table


def _factors(start: int, count: int, device: torch.device) -> Tensor:
    """Odd 64-bit factors that look random (splitmix64), equal on every device, for these places."""
    x = torch.arange(start + 1, start + count + 1, dtype=torch.int64, device=device) * -7046029254386353131
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return (x ^ ((x >> 31) & 0x1FFFFFFFF)) | 1
