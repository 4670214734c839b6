"""Loading a model and its tokenizer by path or hub id."""

from __future__ import annotations

import os
import pickle
from typing import Any

import torch

from cachetune_rag.checking.escaping import words_of
from cachetune_rag.errors import ConfigError, ModelLoadError
from cachetune_store.printing import shown


def load_model(
    source: str | os.PathLike[str],
    *,
    gguf_file: str | None = None,
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
) -> tuple[Any, Any]:
    """Model (in eval mode, on its device) and tokenizer. Arguments as for `CacheTune.from_pretrained`.

    Raises:
        ConfigError: a device or dtype that doesn't exist here.
        ModelLoadError: no model can be loaded from `source`. Says why.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not isinstance(source, str | os.PathLike) or not os.fspath(source):
        raise ConfigError(f"model is {shown(source)}: use a folder made by save_pretrained, or a hub id.")
    for value, name in ((gguf_file, "gguf_file"), (revision, "revision")):
        if value is not None and (not isinstance(value, str) or not value):
            raise ConfigError(f"{name} is {shown(value)}: use a string, or None.")
    place = resolve_device(device)
    extra: dict[str, Any] = {} if revision is None else {"revision": revision}
    if gguf_file is not None:
        extra["gguf_file"] = gguf_file
    weights = dict(extra)
    if gguf_file is not None:
        try:
            from transformers import GgufConfig

            weights["quantization_config"] = GgufConfig(dequantize=True)
        except ImportError:
            pass  # older releases always dequantise
    try:
        # A model folder is data: no code of it runs, and of a pickled checkpoint only tensors are read.
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **extra)
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=resolve_dtype(dtype, place), trust_remote_code=False, weights_only=True, **weights
        )
    except (OSError, ValueError, ImportError, KeyError, pickle.UnpicklingError) as error:
        raise ModelLoadError(
            f"no model could be loaded from {shown(os.fspath(source))}: {words_of(error)} "
            "Give a folder made by save_pretrained, a hub id, or a folder with gguf_file=."
        ) from error
    return model.to(place).eval(), tokenizer


def load_tokenizer(source: str | os.PathLike[str], revision: str | None = None, *, gguf_file: str | None = None) -> Any:
    """Only the tokenizer of a model, as `load_model` loads it.

    Raises:
        ModelLoadError: no tokenizer can be loaded from `source`. Says why.
    """
    from transformers import AutoTokenizer

    extra = {} if revision is None else {"revision": revision}
    if gguf_file is not None:
        extra["gguf_file"] = gguf_file
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False, **extra)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ModelLoadError(
            f"no tokenizer could be loaded from {shown(os.fspath(source))}: {words_of(error)} "
            "Give a folder made by save_pretrained, or a hub id."
        ) from error


def check_loaded(model: Any, tokenizer: Any) -> None:
    """Refuse a path or hub id where a loaded model or tokenizer belongs.

    Raises:
        ConfigError: names `from_pretrained`, which loads both.
    """
    for value, name in ((model, "model"), (tokenizer, "tokenizer")):
        if isinstance(value, str | bytes | os.PathLike) or not hasattr(
            value, "config" if name == "model" else "encode"
        ):
            raise ConfigError(
                f"{name} is {shown(value)}: CacheTune(model, tokenizer) takes both loaded, as transformers makes them; "
                'CacheTune.from_pretrained("path-or-hub-id") loads them.'
            )


def check_vocabulary(model: Any, tokenizer: Any) -> None:
    """Refuse a tokenizer with token ids for which the model has no embedding. The model may have more embeddings than there are ids.

    Raises:
        ConfigError: names both numbers.
    """
    embedding = model.get_input_embeddings()
    rows = int(getattr(embedding, "num_embeddings", None) or embedding.weight.shape[0])
    added = getattr(tokenizer, "added_tokens_decoder", {})
    # A text never becomes a special token, so one without an embedding (a padding token, for example) does no harm.
    beyond = {i: token for token, i in tokenizer.get_vocab().items() if i >= rows}
    beyond = {i: token for i, token in beyond.items() if i not in added or not added[i].special}
    if beyond:
        first = min(beyond)
        raise ConfigError(
            f"the tokenizer has {len(tokenizer)} tokens and the model embeds {rows}: {shown(beyond[first])} would be token {first}, which it "
            "doesn't know. Use the tokenizer that belongs to the model, or model.resize_token_embeddings(len(tokenizer))."
        )


def resolve_device(device: str) -> torch.device:
    """The device that is meant; "auto" is a GPU if there is one."""
    if not isinstance(device, str | torch.device):
        raise ConfigError(f"device is {shown(device)}: use 'auto', 'cpu', 'cuda' or 'cuda:<number>'.")
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"device is {shown(device)}: use 'auto', 'cpu', 'cuda' or 'cuda:<number>'.") from None
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device is {shown(device)}, but this machine shows {torch.cuda.device_count()} CUDA devices: use 'auto' or 'cpu'."
        )
    return place


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype | str:
    """ "auto" is the checkpoint's dtype on a GPU and float32 on a CPU, where half types are several times slower."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if not isinstance(dtype, str):
        raise ConfigError(f"dtype is {shown(dtype)}: use 'auto', 'float32', 'bfloat16' or 'float16'.")
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    named = getattr(torch, dtype, None)
    if named not in (torch.float32, torch.float16, torch.bfloat16):
        raise ConfigError(f"dtype is {shown(dtype)}: use 'auto', 'float32', 'bfloat16' or 'float16'.")
    return named
