"""What stands beside stored bytes, to show that they are what the store has written: checksums, or keyed hashes where the store has a key.

Checksums find accidents. Nobody who lacks the store's key can make a keyed hash, so these find forgeries as well. A keyed hash is over what the
bytes are (which chunk, layer and block, which record), too. So bytes that the store has written itself are refused in any other place.
"""

from __future__ import annotations

import hmac
import struct
from abc import ABC, abstractmethod
from typing import Any

import xxhash

from .checksums import rows_checksum, update
from .keys import ChunkKey
from .storekey import hkdf

__all__ = ["CHECKSUMS", "Checksums", "KeyedHashes", "Seal"]


class Seal(ABC):
    """Makes and checks the sums of a store.

    Attributes:
        name: what chunk files say of their sums; "" for checksums, of which they say nothing.
        words: 64-bit numbers of the sum of a block of rows.
        digits: characters of the sum of a record.
    """

    name: str
    words: int
    digits: int

    @abstractmethod
    def rows(self, key: ChunkKey, layer: int, block: int, rows: memoryview) -> int | tuple[int, ...]:
        """The sum of a block of rows of a chunk: a number, or `words` of them."""

    @abstractmethod
    def matches(self, key: ChunkKey, layer: int, block: int, rows: memoryview, expected: Any) -> bool:
        """Whether this is the sum of these rows, as `rows` gave it (a list will do for a tuple)."""

    @abstractmethod
    def head(self, key: ChunkKey, front: bytes | memoryview, small: bytes | memoryview) -> bytes:
        """The digest of a chunk file's head, 16 bytes: over all before the first row, except the digest itself."""

    @abstractmethod
    def record(self, kind: str, name: str, content: bytes) -> str:
        """The sum of a small record, `digits` characters.

        Args:
            kind: what the record is of, such as "document". A record of another kind never has the same sum where there is a key.
            name: which one it is.
            content: what it says.
        """

    @abstractmethod
    def wrap(self, kind: str, name: str, content: bytes) -> bytes:
        """A record that has checks of its own against accidents (a note, a change), as it is written. Arguments as for `record`."""

    @abstractmethod
    def unwrap(self, kind: str, name: str, raw: bytes) -> bytes | None:
        """The record's content; None if it was changed since, or is not that record."""


class Checksums(Seal):
    """XXH3. Quick, and without a secret: whoever changes the bytes can make the sum as well."""

    name, words, digits = "", 1, 16

    def rows(self, key: ChunkKey, layer: int, block: int, rows: memoryview) -> int:
        """See Seal."""
        return rows_checksum(rows)

    def matches(self, key: ChunkKey, layer: int, block: int, rows: memoryview, expected: Any) -> bool:
        """See Seal."""
        return bool(rows_checksum(rows) == expected)

    def head(self, key: ChunkKey, front: bytes | memoryview, small: bytes | memoryview) -> bytes:
        """See Seal."""
        state = xxhash.xxh3_128()
        update(state, front)
        update(state, small)
        return bytes(state.digest())

    def record(self, kind: str, name: str, content: bytes) -> str:
        """See Seal."""
        return str(xxhash.xxh3_64_hexdigest(content))

    def wrap(self, kind: str, name: str, content: bytes) -> bytes:
        """See Seal."""
        return content

    def unwrap(self, kind: str, name: str, raw: bytes) -> bytes | None:
        """See Seal."""
        return raw


class KeyedHashes(Seal):
    """HMAC-SHA256, of which 128 bits are kept, with a key for each kind of bytes.

    Args:
        root: the store's root key.
    """

    name, words, digits = "hmac-sha256", 2, 32

    def __init__(self, root: bytes) -> None:
        self._root = root
        # A copy of a begun hash costs less than to begin one with its key.
        self._rows, self._heads = (hmac.new(self._key(kind), digestmod="sha256") for kind in ("rows", "head"))
        self._records: dict[str, bytes] = {}

    def __repr__(self) -> str:
        return "KeyedHashes(...)"

    def rows(self, key: ChunkKey, layer: int, block: int, rows: memoryview) -> tuple[int, ...]:
        """See Seal."""
        return struct.unpack("<2Q", self._sum(key, layer, block, rows))

    def matches(self, key: ChunkKey, layer: int, block: int, rows: memoryview, expected: Any) -> bool:
        """See Seal."""
        return hmac.compare_digest(self._sum(key, layer, block, rows), struct.pack("<2Q", *expected))

    def head(self, key: ChunkKey, front: bytes | memoryview, small: bytes | memoryview) -> bytes:
        """See Seal."""
        state = self._heads.copy()
        state.update(struct.pack("<64sQ", key.digest.encode(), len(front)))
        state.update(front)
        state.update(small)
        return state.digest()[:16]

    def record(self, kind: str, name: str, content: bytes) -> str:
        """See Seal."""
        secret = self._records.get(kind) or self._records.setdefault(kind, self._key(f"record {kind}"))
        named = name.encode("utf-8", "surrogatepass")
        return hmac.digest(secret, struct.pack("<Q", len(named)) + named + content, "sha256").hex()[: self.digits]

    def wrap(self, kind: str, name: str, content: bytes) -> bytes:
        """See Seal."""
        return self.record(kind, name, content).encode() + content

    def unwrap(self, kind: str, name: str, raw: bytes) -> bytes | None:
        """See Seal."""
        content = raw[self.digits :]
        return content if hmac.compare_digest(raw[: self.digits], self.record(kind, name, content).encode()) else None

    def _sum(self, key: ChunkKey, layer: int, block: int, rows: memoryview) -> bytes:
        state = self._rows.copy()
        state.update(struct.pack("<64sQQQ", key.digest.encode(), layer, block, len(rows)))
        state.update(rows)
        return state.digest()[:16]

    def _key(self, purpose: str) -> bytes:
        return hkdf(self._root, info=f"cachetune/{purpose}".encode())


CHECKSUMS = Checksums()
"""The seal of stores without a key."""
