"""Tiny random models that both vLLM and transformers load, one for each family of `tests/families.py` and in sizes that vLLM has kernels for."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests import families, tiny

VOCAB = 261
"""Ids of the tokenizer of `tests/tiny.py`: one a byte. vLLM pads such a vocabulary."""
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
    "eos_token_id": 2,
}
HEAD_DIM = 32
"""The least that vLLM's attention has a kernel for."""


def row_of(name: str) -> families.Family:
    """The family's row in sizes that vLLM runs."""
    row = families.family(name)
    config = row.config | SIZES
    if "head_dim" in config:
        config["head_dim"] = HEAD_DIM
    rope = config["rope_parameters"] = deepcopy(config["rope_parameters"])
    for part in (rope, *rope.values()):
        # vLLM's table of rotations ends where scaling says that the model's context does.
        if isinstance(part, dict) and part.get("rope_type") in ("yarn", "longrope"):
            part["factor"] = SIZES["max_position_embeddings"] / part["original_max_position_embeddings"]
            if part["rope_type"] == "yarn":  # what transformers takes where it isn't said; vLLM's gpt-oss wants it said
                part |= {"beta_fast": 32.0, "beta_slow": 1.0} | part
            for name in {"short_factor", "long_factor"} & set(
                part
            ):  # one for each pair of channels: twice as many here
                part[name] = [factor for factor in part[name] for _ in range(2)]
    return replace(row, config=config)


def save_tiny(name: str, folder: Path) -> Path:
    """Write the family's model and a tokenizer below `folder`, once. Returns their folder."""
    place = folder / name
    if not place.exists():
        model = row_of(name).build()
        model.save_pretrained(place)
        tiny.tokenizer().save_pretrained(place)
    return place
