"""Seals of stores that have a key: keyed hashes of small records, and of chunk files where these aren't encrypted."""

from __future__ import annotations

import hmac
import struct
from collections.abc import Mapping
from typing import Any

from .keys import ChunkKey
from .seals import Buffer, Seal, SealOfAllFiles, bytes_of
from .storekey import hkdf

__all__ = ["KeyedHashes", "KeyedRecords", "named"]


class KeyedRecords(Seal):
    """HMAC-SHA256 of small records, of which 128 bits are kept, with a key for each kind.

    Args:
        root: the store's root key.
    """

    digits = 32

    def __init__(self, root: bytes) -> None:
        self._root = root
        self._records: dict[str, bytes] = {}

    def __repr__(self) -> str:
        return f"{type(self).__name__}(...)"

    def record(self, kind: str, name: str, content: bytes) -> str:
        """See Seal."""
        secret = self._records.get(kind) or self._records.setdefault(kind, self.key(f"record {kind}"))
        return hmac.digest(secret, named(name) + content, "sha256").hex()[:32]

    def wrap(self, kind: str, name: str, content: bytes, tenant: str | None = None) -> bytes:
        """See Seal."""
        return self.record(kind, name, content).encode() + content

    def unwrap(self, kind: str, name: str, raw: bytes, tenant: str | None = None) -> bytes | None:
        """See Seal."""
        content = raw[self.digits :]
        return content if hmac.compare_digest(raw[: self.digits], self.record(kind, name, content).encode()) else None

    def key(self, purpose: str, length: int = 32) -> bytes:
        """A key for one purpose."""
        return hkdf(self._root, info=f"cachetune/{purpose}".encode(), length=length)


class KeyedHashes(KeyedRecords, SealOfAllFiles):
    """HMAC-SHA256 in chunk files, too."""

    name, words = "hmac-sha256", 2
    metadata: Mapping[str, str] = {"sums": name}

    def __init__(self, root: bytes) -> None:
        super().__init__(root)
        # A copy of a begun hash costs less than to begin one with its key.
        self._rows, self._heads = (hmac.new(self.key(kind), digestmod="sha256") for kind in ("rows", "head"))

    def rows(
        self, key: ChunkKey, layer: int, block: int, rows: memoryview, into: memoryview | None = None
    ) -> int | tuple[int, ...]:
        """See FileSeal."""
        return struct.unpack("<2Q", self._sum(key, layer, block, rows))

    def matches(
        self, key: ChunkKey, layer: int, block: int, found: memoryview, expected: Any, into: memoryview | None = None
    ) -> bool:
        """See FileSeal."""
        return hmac.compare_digest(self._sum(key, layer, block, found), struct.pack("<2Q", *expected))

    def head(self, key: ChunkKey, front: Buffer, small: Buffer) -> tuple[bytes, Buffer]:
        """See FileSeal."""
        state = self._heads.copy()
        state.update(struct.pack("<64sQ", key.digest.encode(), len(front)))
        state.update(front)
        state.update(small)
        return state.digest()[:16], small

    def _sum(self, key: ChunkKey, layer: int, block: int, rows: memoryview) -> bytes:
        state = self._rows.copy()
        state.update(struct.pack("<64sQQQ", key.digest.encode(), layer, block, len(rows)))
        state.update(rows)
        return state.digest()[:16]


def named(name: str) -> bytes:
    """A name in front of what is hashed: its length, then itself."""
    content = bytes_of(name)
    return struct.pack("<Q", len(content)) + content
