"""Random models of real models' shapes, and random letters as text. Speed doesn't depend on what a text says."""

from __future__ import annotations

import random
import re
import string
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from tiny import tokenizer as _byte_tokenizer

_BLANK_AT_AN_EDGE = re.compile(r"\A | \Z")
_COMMON: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}
_LLAMA: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
}
_YARN = {"rope_type": "yarn", "rope_theta": 500000.0, "factor": 5.0, "original_max_position_embeddings": 32768}
SHAPES: dict[str, PreTrainedConfig] = {
    "llama-3.1-8b": LlamaConfig(**_LLAMA, max_position_embeddings=131072, rope_theta=500000.0, **_COMMON),
    # Room for 131,072 chunk tokens and the rest of a prompt.
    "llama-3.1-8b-yarn": LlamaConfig(**_LLAMA, max_position_embeddings=163840, rope_parameters=_YARN, **_COMMON),
    "qwen2.5-7b": Qwen2Config(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, max_position_embeddings=131072, rms_norm_eps=1e-6, rope_theta=1000000.0, **_COMMON,
    ),
    "mistral-7b": MistralConfig(
        vocab_size=32768, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=131072, sliding_window=None, rope_theta=1000000.0, **_COMMON,
    ),
    "tiny": LlamaConfig(
        vocab_size=261, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=131072, **_COMMON,
    ),
    # vLLM's attention on a CPU needs heads of 32.
    "tiny-wide-heads": LlamaConfig(
        vocab_size=261, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=131072, **_COMMON,
    ),
}  # fmt: skip


def build(shape: str, device: str) -> Any:
    """A random model of this shape in bfloat16."""
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(SHAPES[shape], dtype=torch.bfloat16).eval()


def tokenizer(bos: bool = True) -> Any:
    """A tokenizer with one token for each letter."""
    return _byte_tokenizer(bos=bos, chat=False)


def letters(seed: Any, count: int, tokens: int) -> list[str]:
    """`count` texts of `tokens` random letters and spaces, the same for the same seed.

    Each begins and ends with a letter. A blank there is a sign of a line that is cut between two chunks: by chance, some chunks would have
    other tokens recomputed than those that the ranking puts first, and more of their rows read.
    """
    source = random.Random(seed)
    drawn = ("".join(source.choices(string.ascii_lowercase + " " * 5, k=tokens)) for _ in range(count))
    return [_BLANK_AT_AN_EDGE.sub(lambda _: source.choice(string.ascii_lowercase), text) for text in drawn]
