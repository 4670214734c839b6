"""Chunk keys: what a chunk's keys and values depend on, hashed.

Everything that changes the numbers is in the hash (format version, model, tokenizer, dtype, lead-ins, token ids), and
so is the tenant, so that a key can only ever name bytes that are right for whoever asks.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import index

import numpy as np

from .errors import StoreArgumentError
from .printing import shown

__all__ = ["FORMAT_VERSION", "ChunkKey", "Namespace", "make_key"]

FORMAT_VERSION = 1
"""What keys are hashes of, and how rows are encoded; part of every key. (`filetable.FILE_VERSION` says where things lie in a file.)"""

DTYPES = ("float32", "bfloat16", "float16")
LEAST_LEAD, MOST_LEAD = -(1 << 62), 1 << 40
"""Token ids that a lead-in can hold, as a file's header is read."""
_HEX64 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class ChunkKey:
    """Identity of a stored chunk; `digest` (64 hex characters) is also its file's name."""

    digest: str

    def __post_init__(self) -> None:
        # The digest becomes a path, so nothing but a digest may pass.
        if not isinstance(self.digest, str) or not _HEX64.fullmatch(self.digest):
            raise StoreArgumentError(
                f"chunk key {shown(self.digest)} is not 64 lower-case hex characters; build keys with make_key()"
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
        lead_ins: what was put before a chunk while it was computed, token ids of each; one at least, which may be empty.
            With several, what is stored is a mean over them.
        tenant: whose chunks these are; "" where there is only one.
    """

    model: str
    tokenizer: str
    dtype: str
    lead_ins: tuple[tuple[int, ...], ...]
    tenant: str = ""

    def __post_init__(self) -> None:
        for name in ("model", "tokenizer", "dtype", "tenant"):
            if not isinstance(getattr(self, name), str):
                raise StoreArgumentError(f"namespace {name} is {shown(getattr(self, name))}; it must be a string")
        if self.dtype not in DTYPES:
            raise StoreArgumentError(f"dtype {shown(self.dtype)} is not stored; allowed: {', '.join(DTYPES)}")
        try:
            lead_ins = tuple(tuple(map(index, lead_in)) for lead_in in self.lead_ins)
        except TypeError as error:
            raise StoreArgumentError(
                f"lead_ins is {shown(self.lead_ins)}; it must be lists of token ids, one a lead-in"
            ) from error
        if any(lead_in and not (min(lead_in) >= LEAST_LEAD and max(lead_in) <= MOST_LEAD) for lead_in in lead_ins):
            raise StoreArgumentError(f"lead_ins is {shown(self.lead_ins)}; token ids go up to {MOST_LEAD}")
        if not lead_ins:
            raise StoreArgumentError("lead_ins is empty; a chunk has one lead-in at least, () for none of any tokens")
        object.__setattr__(self, "lead_ins", lead_ins)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the whole namespace, in hex. Kept, because lead-ins are long and a request makes many keys."""
        return _digest(
            b"cachetune-namespace",
            str(FORMAT_VERSION).encode(),
            *map(_text, (self.model, self.tokenizer, self.dtype, self.tenant)),
            *map(_ids, self.lead_ins),
        )


def make_key(ns: Namespace, token_ids: Sequence[int]) -> ChunkKey:
    """The key of the chunk with these token ids: SHA-256 over the namespace's digest and the ids.

    Raises:
        StoreArgumentError: they are no token ids, or `ns` is no namespace.
    """
    if not isinstance(ns, Namespace):
        raise StoreArgumentError(f"namespace is {shown(ns)}, a {type(ns).__name__}; use a Namespace")
    return ChunkKey(_digest(b"cachetune-chunk", ns.digest.encode(), _ids(token_ids)))


def _digest(*parts: bytes) -> str:
    """SHA-256 over a length-prefixed, hence unambiguous, encoding of the parts."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(len(part).to_bytes(8, "little"))
        sha.update(part)
    return sha.hexdigest()


def _ids(token_ids: Sequence[int]) -> bytes:
    try:
        ids = np.asarray(token_ids)
        whole = ids.dtype.kind == "i" or (ids.dtype.kind == "u" and int(ids.max(initial=0)) < 1 << 63)
        if ids.ndim == 1 and (whole or not ids.size):
            return ids.astype("<i8").tobytes()
    except (TypeError, ValueError, OverflowError, RuntimeError, RecursionError):
        pass
    raise StoreArgumentError(f"token ids are {shown(token_ids)}; use a list of ints that fit into 64 bits")


def _text(value: str) -> bytes:
    # Lone surrogates come from broken JSON or file names; they must hash, not crash.
    return value.encode("utf-8", "surrogatepass")
