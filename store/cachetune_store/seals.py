"""What stands beside stored bytes, to show that they are what the store has written: checksums, or keyed hashes where the store has a key.

Checksums find accidents. Nobody who lacks the store's key can make a keyed hash (keyed_hashes.py), so these find forgeries as well. A keyed hash is over what the
bytes are (which chunk, layer and block, which record), too. So bytes that the store has written itself are refused in any other place.

Where the store is encrypted (encryption.py), other bytes are written than those that are stored. So nothing here says "check": a seal is
asked to close what is written, and to open what is read.
"""

from __future__ import annotations

import hashlib
import hmac
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import xxhash

from .checksums import rows_checksum, update
from .errors import DamagedChunkError
from .keys import ChunkKey
from .printing import shown

__all__ = ["CHECKSUMS", "Buffer", "Checksums", "FileSeal", "Seal", "SealOfAllFiles", "bytes_of", "check_sums"]

Buffer = bytes | memoryview


class FileSeal(ABC):
    """Closes and opens one chunk file.

    Attributes:
        words: 64-bit numbers of the sum of a block of rows.
        hides: whether the file holds other bytes than the rows. Then rows can't be used where they were read: opening puts them elsewhere.
        metadata: what the file's header says of its seal, by name.
    """

    words: int
    hides = False
    metadata: Mapping[str, str]

    @abstractmethod
    def rows(
        self, key: ChunkKey, layer: int, block: int, rows: memoryview, into: memoryview | None = None
    ) -> int | tuple[int, ...]:
        """The sum of a block of rows of a chunk: a number, or `words` of them.

        If the file hides its rows, what it holds in their place is written to `into`, which is as long. Otherwise it holds the rows.
        """

    @abstractmethod
    def matches(
        self, key: ChunkKey, layer: int, block: int, found: memoryview, expected: Any, into: memoryview | None = None
    ) -> bool:
        """Whether what was found in a file is a block that was written there, with the sum `expected` (a list will do for a tuple).

        If the file hides its rows, they are written to `into`, where nothing may be used unless this returns True.
        """

    @abstractmethod
    def head(self, key: ChunkKey, front: Buffer, small: Buffer) -> tuple[bytes, Buffer]:
        """The digest of a chunk file's head, 16 bytes: over all before the first row, except the digest itself.

        Returns:
            The digest, and what the file holds in the place of `small`, which is as long.
        """

    @abstractmethod
    def open_head(self, key: ChunkKey, front: Buffer, digest: Buffer, found: memoryview) -> memoryview | None:
        """What `head` was given as `small`; None if digest and head don't belong together."""

    @abstractmethod
    def chunk_name(self, key: ChunkKey) -> str:
        """The chunk's name in the file. See Seal."""

    def hide_namespace(self, text: str) -> str:
        """The namespace as the file's header holds it."""
        return text

    def reveal_namespace(self, text: str) -> str:
        """What `hide_namespace` was given.

        Raises:
            ValueError: it is not what this file was written with.
        """
        return text


class Seal(ABC):
    """Closes and opens what a store writes.

    Attributes:
        name: what descriptions and messages call it; "" for checksums.
        digits: bytes that a small record gets longer at most.
    """

    name: str
    digits: int

    # -- chunk files --------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def in_memory(self) -> FileSeal:
        """What makes the sums of chunks that are encoded and not written yet."""

    @abstractmethod
    def new_file(self, tenant: str) -> FileSeal:
        """What closes a file that is about to be written with a chunk of this tenant."""

    @abstractmethod
    def file(self, key: ChunkKey, metadata: Mapping[str, Any]) -> FileSeal:
        """What opens the file of a chunk, of which the header says this.

        Raises:
            DamagedChunkError: no file of this store has such a header.
        """

    def chunk_name(self, key: ChunkKey) -> str:
        """The name that stands for a chunk wherever others can see it: hexadecimal digits."""
        return key.digest

    def chunk_key(self, name: str) -> ChunkKey:
        """The chunk of this name.

        Raises:
            ValueError: it is the name of none.
        """
        return ChunkKey(name)

    # -- names of other things ----------------------------------------------------------------------------------------

    def index_name(self, name: str) -> str:
        """The name of a record as the index's database has it. It begins with the same word, up to the first slash."""
        return name

    def plain_index_name(self, name: str) -> str:
        """The name that `index_name` was given.

        Raises:
            ValueError: it gives no such name.
        """
        return name

    def hashed(self, kind: str, text: str) -> str:
        """A hash that stands for a text in names of files, 64 hexadecimal digits."""
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    def rehashed(self, kind: str, digest: str) -> str:
        """What stands in names of files for a hash that others could make as well, 64 hexadecimal digits."""
        return digest

    # -- small records ------------------------------------------------------------------------------------------------

    @abstractmethod
    def record(self, kind: str, name: str, content: bytes) -> str:
        """The sum of a small record.

        Args:
            kind: what the record is of, such as "document". A record of another kind never has the same sum where there is a key.
            name: which one it is.
            content: what it says.
        """

    @abstractmethod
    def wrap(self, kind: str, name: str, content: bytes, tenant: str | None = None) -> bytes:
        """A record that has checks of its own against accidents (a note, a change), as it is written. Arguments as for `record`.

        Where the store is encrypted, what is of a tenant can't be read any more once the tenant is deleted. None: it is nobody's.
        """

    @abstractmethod
    def unwrap(self, kind: str, name: str, raw: bytes, tenant: str | None = None) -> bytes | None:
        """The record's content; None if it was changed since, or is not that record.

        Raises:
            ErasedChunkError: its tenant was deleted since.
            StoreKeyError: the tenant's secret can't be had now.
        """

    def hide_text(self, tenant: str, key: ChunkKey, text: str) -> str:
        """A chunk's text as records have it. The same text gives the same. Where the store is encrypted, it ends with its tenant."""
        return text

    def reveal_text(self, key: ChunkKey, hidden: str) -> str | None:
        """The text that `hide_text` was given; None if nobody can read it any more.

        Raises:
            ErasedChunkError: its tenant was deleted since.
            StoreKeyError: the tenant's secret can't be had now.
        """
        return hidden

    def stamp(self, kind: str, name: str, text: str) -> str:
        """A record that has no checks of its own, as it is written. Arguments as for `record`."""
        return self.record(kind, name, bytes_of(text)) + text

    def unstamp(self, kind: str, name: str, raw: str) -> str | None:
        """The record's text; None if it was changed since, or is not that record."""
        text = raw[self.digits :]
        sound = hmac.compare_digest(bytes_of(raw[: self.digits]), self.record(kind, name, bytes_of(text)).encode())
        return text if sound else None

    def hide(self, kind: str, name: str, content: bytes) -> bytes:
        """A record that has its sum in its content, as it is written. Arguments as for `record`."""
        return content

    def reveal(self, kind: str, name: str, raw: bytes) -> bytes | None:
        """The record's content; None if it was hidden otherwise."""
        return raw


class SealOfAllFiles(Seal, FileSeal):
    """One seal for the records and all chunk files, whoever they belong to, with sums beside contents that stay as they are."""

    name: str
    """What files say of their sums."""

    @property
    def in_memory(self) -> FileSeal:
        """See Seal."""
        return self

    def new_file(self, tenant: str) -> FileSeal:
        """See Seal."""
        return self

    def file(self, key: ChunkKey, metadata: Mapping[str, Any]) -> FileSeal:
        """See Seal."""
        check_sums(self.name, key, metadata)
        return self

    def open_head(self, key: ChunkKey, front: Buffer, digest: Buffer, found: memoryview) -> memoryview | None:
        """See FileSeal."""
        return found if hmac.compare_digest(digest, self.head(key, front, found)[0]) else None


class Checksums(SealOfAllFiles):
    """XXH3. Quick, and without a secret: whoever changes the bytes can make the sum as well."""

    name, words, digits = "", 1, 16
    metadata: Mapping[str, str] = {}

    def rows(
        self, key: ChunkKey, layer: int, block: int, rows: memoryview, into: memoryview | None = None
    ) -> int | tuple[int, ...]:
        """See FileSeal."""
        return rows_checksum(rows)

    def matches(
        self, key: ChunkKey, layer: int, block: int, found: memoryview, expected: Any, into: memoryview | None = None
    ) -> bool:
        """See FileSeal."""
        return bool(rows_checksum(found) == expected)

    def head(self, key: ChunkKey, front: Buffer, small: Buffer) -> tuple[bytes, Buffer]:
        """See FileSeal."""
        state = xxhash.xxh3_128()
        update(state, front)
        update(state, small)
        return bytes(state.digest()), small

    def record(self, kind: str, name: str, content: bytes) -> str:
        """See Seal."""
        return str(xxhash.xxh3_64_hexdigest(content))

    def wrap(self, kind: str, name: str, content: bytes, tenant: str | None = None) -> bytes:
        """See Seal."""
        return content

    def unwrap(self, kind: str, name: str, raw: bytes, tenant: str | None = None) -> bytes | None:
        """See Seal."""
        return raw


def check_sums(own: str, key: ChunkKey, metadata: Mapping[str, Any]) -> None:
    """See that a file says of its sums what those of this store say.

    Raises:
        DamagedChunkError: it says something else.
    """
    if metadata.get("sums", "") != own:
        raise DamagedChunkError(
            f"chunk {key}: the file's sums are {shown(metadata.get('sums', 'xxh3'))}; those of this store are {own or 'xxh3'}"
        )


def bytes_of(text: str) -> bytes:
    """A text's bytes."""
    # A damaged database may hand out what is no UTF-8, with surrogates in place of the odd bytes.
    return text.encode("utf-8", "surrogatepass")


CHECKSUMS = Checksums()
"""The seal of stores without a key."""
