"""The model and the store of a benchmark of serving, as files that servers open."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path

import torch
from speed.shapes import SHAPES, build, letters, tokenizer

from cachetune_rag import CacheTune
from served.plan import SHORT, SHORT_CHUNKS
from served.workload import Workload

FEW_TOKENS = 128
"""Tokens of a short chunk."""


def prepare(
    folder: Path, shape: str, device: str, tokens: int, chunk_tokens: int, codecs: Sequence[str] = ("exact",)
) -> tuple[Path, Path, dict[str, Workload]]:
    """Write a random model of a shape and a store with chunks of `tokens` tokens in each codec. What is there already is used again.

    Chunks of different codecs have different texts, since a store has each chunk once.

    A server whose weights vLLM quantises while it loads them, or whose pages have 8-bit numbers, reuses the chunks of the same store: they are those of
    the checkpoint.

    Returns: the model's folder, the store's, and what makes prompts of the stored chunks, by codec; that of short chunks is `SHORT_CHUNKS`.
    """
    if shape not in SHAPES:
        raise ValueError(f"shape is {shape!r}: use one of {', '.join(sorted(SHAPES))}.")
    count = max(1, tokens // chunk_tokens)
    workloads = {codec: Workload(tokenizer(), letters(f"stored {codec}", count, chunk_tokens)) for codec in codecs}
    few = min(chunk_tokens, FEW_TOKENS)
    workloads[SHORT_CHUNKS] = Workload(
        tokenizer(), letters("stored short", max(1, min(tokens, max(SHORT)) // few), few)
    )
    model_path, store = folder / f"model-{shape}", folder / f"kv-{shape}-{tokens}-{chunk_tokens}"
    wanted = [name for name in workloads if not (folder / f"{store.name}-{name}.complete").exists()]
    if wanted:
        model, own = build(shape, device), tokenizer()
        model.save_pretrained(model_path)
        own.save_pretrained(model_path)
        for name in wanted:
            codec = "exact" if name == SHORT_CHUNKS else name
            with CacheTune(model, own, store, codec=codec, host_budget="1GiB") as engine:
                engine.precompute(list(workloads[name].stored))
            (folder / f"{store.name}-{name}.complete").touch()
            del engine
        del model
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    return model_path, store, workloads
