"""What a benchmark runs on: a real model with real text, or a random model of a real model's shape with random letters."""

from __future__ import annotations

import argparse
import random
import string
from pathlib import Path
from typing import Any

from common import real_chunks

from cachetune_rag.model.loading import load_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose model and text."""
    parser.add_argument("--model", type=Path, help="folder of a model (default: SmolLM2-135M-Instruct)")
    parser.add_argument(
        "--shape", help="a random model of this shape instead: a name of speed/shapes.py, such as llama-3.1-8b"
    )
    parser.add_argument("--chunks", type=int, default=8, help="chunks of a prompt")
    parser.add_argument("--chunk-tokens", type=int, default=256)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")


def load(args: argparse.Namespace) -> tuple[Any, Any]:
    """Model and tokenizer."""
    if args.shape is None:
        from smollm2 import model_path

        return load_model(args.model or model_path(), device=args.device, dtype=args.dtype)
    import torch
    from speed.shapes import build, tokenizer

    device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    return build(args.shape, device), tokenizer()


def passages(args: argparse.Namespace, tokenizer: Any, prompts: int) -> list[list[str]]:
    """The chunks of `prompts` prompts. No chunk is in two of them."""
    count = args.chunks * prompts
    if args.shape is None:
        texts = real_chunks(tokenizer, count, args.chunk_tokens)
    else:  # each letter is one token; speed doesn't depend on what the text says
        letters = random.Random(0)
        texts = ["".join(letters.choices(string.ascii_lowercase + " " * 5, k=args.chunk_tokens)) for _ in range(count)]
    return [texts[i * args.chunks : (i + 1) * args.chunks] for i in range(prompts)]
