"""Fingerprints of weights: the same formula whatever is summed at once, so that stores of earlier releases stay valid."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
import torch

from cachetune_rag.model.loaded.fingerprint import fingerprint_of

BLOCK = 1 << 22
PART = 1 << 18
MASK = (1 << 64) - 1


class Config:
    def get_text_config(self, decoder: bool) -> Config:
        return self

    def to_dict(self) -> dict[str, Any]:
        return {"use_cache": True, "hidden_size": 16}


def factors(count: int) -> Any:
    """splitmix64 of 1, 2, ..., as odd numbers."""
    x = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))) | np.uint64(1)


def reference(tensor: torch.Tensor) -> int:
    """The checksum as numpy computes it, a block at once."""
    width = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64}[tensor.element_size()]
    bits = tensor.reshape(-1).view(torch.uint8).numpy().view(width).astype(np.int64).view(np.uint64)
    total = 0
    for block, start in enumerate(range(0, len(bits), BLOCK)):
        part = bits[start : start + BLOCK]
        total = (total * 6364136223846793005 + int((part * factors(len(part))).sum(dtype=np.uint64)) + block) & MASK
    return total - (1 << 64) if total >> 63 else total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.uint8])
@pytest.mark.parametrize("sizes", [(0, 5), (1000, 7), (2 * PART + 3, PART), (BLOCK + 11, 12)])
def test_the_formula(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weights = [(f"weight{i}", (torch.randn(size) * 50).to(dtype)) for i, size in enumerate(sizes)]
    before = [tensor.clone() for _, tensor in weights]
    found = fingerprint_of("Llama", Config(), weights)
    assert all(a.equal(b) for a, (_, b) in zip(before, weights, strict=True)), "weights are only read"
    digest = hashlib.sha256(b'["Llama", {"hidden_size": 16}]')
    for name, tensor in weights:
        digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|{reference(tensor)}\n".encode())
    assert found == digest.hexdigest()
