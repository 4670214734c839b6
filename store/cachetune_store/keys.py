"""Chunk keys: what a chunk's keys and values depend on, hashed.

Everything that changes the numbers is in the hash (format version, model, tokenizer, dtype, lead-in, token ids), and
so is the tenant, so that a key can only ever name bytes that are right for whoever asks.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["FORMAT_VERSION", "ChunkKey", "Namespace", "make_key"]

FORMAT_VERSION = 1
"""Version of the chunk file format; part of every key."""

DTYPES = ("float32", "bfloat16", "float16")
_HEX64 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class ChunkKey:
    """Identity of a stored chunk; `digest` (64 hex characters) is also its file's name."""

    digest: str

    def __post_init__(self) -> None:
        # The digest becomes a path, so nothing but a digest may pass.
        if not isinstance(self.digest, str) or not _HEX64.fullmatch(self.digest):
            raise ValueError(
                f"chunk key {self.digest!r} is not 64 lower-case hex characters; build keys with make_key()"
            )

    def __str__(self) -> str:
        return self.digest


@dataclass(frozen=True)
class Namespace:
    """The part of a key that all chunks of one engine share.

    Attributes:
        model: fingerprint of architecture and weights.
        tokenizer: fingerprint of the tokenizer.
        dtype: "float32", "bfloat16" or "float16", the dtype of keys and values.
        lead_in: token ids put before a chunk while it was computed.
        tenant: whose chunks these are; "" where there is only one.
    """

    model: str
    tokenizer: str
    dtype: str
    lead_in: tuple[int, ...]
    tenant: str = ""

    def __post_init__(self) -> None:
        for name in ("model", "tokenizer", "dtype", "tenant"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"namespace {name} is {getattr(self, name)!r}; it must be a string")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r} is not stored; allowed: {', '.join(DTYPES)}")
        object.__setattr__(self, "lead_in", tuple(int(token) for token in self.lead_in))

    @property
    def digest(self) -> str:
        """Hex digest of the whole namespace."""
        return _digest("cachetune-namespace", self, ())


def make_key(ns: Namespace, token_ids: Sequence[int]) -> ChunkKey:
    """The key of the chunk with these token ids: SHA-256 over a length-prefixed, hence unambiguous, encoding."""
    return ChunkKey(_digest("cachetune-chunk", ns, token_ids))


def _digest(kind: str, ns: Namespace, token_ids: Sequence[int]) -> str:
    sha = hashlib.sha256()
    for part in (
        kind.encode(),
        str(FORMAT_VERSION).encode(),
        _text(ns.model),
        _text(ns.tokenizer),
        _text(ns.dtype),
        _text(ns.tenant),
        np.asarray(ns.lead_in, dtype="<i8").tobytes(),
        np.asarray(token_ids, dtype="<i8").tobytes(),
    ):
        sha.update(len(part).to_bytes(8, "little"))
        sha.update(part)
    return sha.hexdigest()


def _text(value: str) -> bytes:
    # Lone surrogates come from broken JSON or file names; they must hash, not crash.
    return value.encode("utf-8", "surrogatepass")
