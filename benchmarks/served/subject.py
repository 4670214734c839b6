"""The model and the store of a benchmark of serving, as files that servers open."""

from __future__ import annotations

import gc
from pathlib import Path

import torch
from speed.shapes import SHAPES, build, letters, tokenizer

from cachetune_rag import CacheTune
from served.workload import Workload


def prepare(folder: Path, shape: str, device: str, tokens: int, chunk_tokens: int) -> tuple[Path, Path, Workload]:
    """Write a random model of a shape and a store with chunks of `tokens` tokens in all. What is there already is used again.

    Returns: the model's folder, the store's, and what makes prompts of the stored chunks.
    """
    if shape not in SHAPES:
        raise ValueError(f"shape is {shape!r}: use one of {', '.join(sorted(SHAPES))}.")
    texts = letters("stored", max(1, tokens // chunk_tokens), chunk_tokens)
    model_path, store = folder / f"model-{shape}", folder / f"kv-{shape}-{tokens}-{chunk_tokens}"
    done = folder / f"{store.name}.complete"
    if not done.exists():
        model, own = build(shape, device), tokenizer()
        model.save_pretrained(model_path)
        own.save_pretrained(model_path)
        with CacheTune(model, own, store, host_budget="1GiB") as engine:
            engine.precompute(texts)
        done.touch()
        del model, engine
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    return model_path, store, Workload(tokenizer(), texts)
