"""The model and the store of a benchmark of serving, as files that servers open."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path

import torch
from speed.shapes import SHAPES, build, letters, tokenizer

from cachetune_rag import CacheTune
from served.workload import Workload


def prepare(
    folder: Path, shape: str, device: str, tokens: int, chunk_tokens: int, codecs: Sequence[str] = ("exact",)
) -> tuple[Path, Path, dict[str, Workload]]:
    """Write a random model of a shape and a store with chunks of `tokens` tokens in each codec. What is there already is used again.

    Chunks of different codecs have different texts, since a store has each chunk once.

    Returns: the model's folder, the store's, and what makes prompts of the stored chunks, by codec.
    """
    if shape not in SHAPES:
        raise ValueError(f"shape is {shape!r}: use one of {', '.join(sorted(SHAPES))}.")
    count = max(1, tokens // chunk_tokens)
    workloads = {codec: Workload(tokenizer(), letters(f"stored {codec}", count, chunk_tokens)) for codec in codecs}
    model_path, store = folder / f"model-{shape}", folder / f"kv-{shape}-{tokens}-{chunk_tokens}"
    wanted = [codec for codec in codecs if not (folder / f"{store.name}-{codec}.complete").exists()]
    if wanted:
        model, own = build(shape, device), tokenizer()
        model.save_pretrained(model_path)
        own.save_pretrained(model_path)
        for codec in wanted:
            with CacheTune(model, own, store, codec=codec, host_budget="1GiB") as engine:
                engine.precompute(list(workloads[codec].stored))
            (folder / f"{store.name}-{codec}.complete").touch()
            del engine
        del model
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    return model_path, store, workloads
