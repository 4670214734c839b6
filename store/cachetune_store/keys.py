"""Chunk keys: a hash of all that a chunk's keys and values depend on.

This is the format version, the model, the tokenizer, the dtype, the lead-ins and the token ids. The tenant is in the hash as well, so
that no tenant can get another one's chunks.
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
"""Version of the chunk file format. It is part of every key."""

DTYPES = ("float32", "bfloat16", "float16")
LEAST_LEAD, MOST_LEAD = -(1 << 62), 1 << 40
"""The smallest and the largest token id that a lead-in can hold."""
_HEX64 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class ChunkKey:
    """The name of a stored chunk. `digest` has 64 hex characters and is also the name of its file."""

    digest: str

    def __post_init__(self) -> None:
        # The digest becomes part of a path, so anything else is refused.
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
        lead_ins: token ids of each lead-in. There is at least one, which may be empty. With several, the mean over them is stored.
        tenant: the tenant that the chunks belong to; "" if there is only one.
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
            leads = tuple(tuple(map(index, lead)) for lead in self.lead_ins)
        except TypeError as error:
            raise StoreArgumentError(
                f"lead_ins is {shown(self.lead_ins)}; it must be lists of token ids, one a lead-in"
            ) from error
        if any(lead and not (min(lead) >= LEAST_LEAD and max(lead) <= MOST_LEAD) for lead in leads):
            raise StoreArgumentError(f"lead_ins is {shown(self.lead_ins)}; token ids go up to {MOST_LEAD}")
        if not leads:
            raise StoreArgumentError("lead_ins is empty; a chunk has one lead-in at least, () for none of any tokens")
        object.__setattr__(self, "lead_ins", leads)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the whole namespace, in hex. It is computed once, because lead-ins are long and a request makes many keys."""
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
    """SHA-256 over the parts, each with its length before it, so that different parts never give the same bytes."""
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
    # Broken JSON and file names can contain lone surrogates, which must not raise an error here.
    return value.encode("utf-8", "surrogatepass")
