"""The seal of an encrypted store: AES-256-GCM in chunk files, AES-SIV for small records and names.

A chunk file has a key of its own, drawn when it is written: HKDF-SHA256 of its tenant's secret and of 32 random bytes in its header. So the place of a
block, its layer and number, is nonce enough, and no nonce comes twice under one key. The tags stand where other stores have checksums, so a
file is as long, and its rows are read in the same pieces.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import json
import os
import secrets
import struct
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import AESSIV
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import GCM

from .errors import DamagedChunkError
from .keyed_hashes import KeyedRecords, named
from .keys import ChunkKey
from .seals import CHECKSUMS, Buffer, FileSeal, bytes_of, check_sums
from .storekey import ENCRYPTED, hkdf

__all__ = ["Encryption", "FileCipher", "Keyring"]

_HEAD = 0xFFFFFFFF
"""Stands in a nonce where blocks of rows have their layer."""
_SALT = 32
_NONCE = 16
_BY_CHUNK = frozenset({"chunk", "text", "ref", "remote", "waiting"})
"""Kinds of records of the index that have a chunk's key in their names."""


class Keyring(ABC):
    """The secrets that files' keys are derived from. Each tenant has its own."""

    @abstractmethod
    def current(self, tenant: str) -> tuple[str, bytes]:
        """The secret for new files of a tenant, and its id (hexadecimal digits).

        Raises:
            StorePathError: it has none yet, and can't be given one now.
        """

    @abstractmethod
    def secret(self, tenant: str, identity: str) -> bytes:
        """The secret of this id.

        Raises:
            ErasedChunkError: it was erased.
            DamagedChunkError: it is lost.
            StoreKeyError: it can't be had now.
        """

    @abstractmethod
    def hide(self, tenant: str, about: bytes, content: bytes) -> bytes:
        """Something small of a tenant, encrypted with its secret. The same gives the same. `about` says what it is."""

    @abstractmethod
    def reveal(self, tenant: str, about: bytes, raw: bytes) -> bytes | None:
        """What `hide` was given; None if it was changed since, or the secret is lost.

        Raises:
            ErasedChunkError: the secret was erased.
            StoreKeyError: the secret can't be had now.
        """


class Encryption(KeyedRecords):
    """Hides what a store holds from those who lack its key, and refuses what they write.

    Args:
        root: the store's root key.
        keyring: the secrets of tenants.

    Attributes:
        keyring: as given.
    """

    name = ENCRYPTED

    def __init__(self, root: bytes, keyring: Keyring) -> None:
        super().__init__(root)
        self.keyring = keyring
        self._names = AESSIV(self.key("names", 64))
        self._hashes = self.key("hashes")
        self._hidden: dict[str, AESSIV] = {}

    # -- chunk files --------------------------------------------------------------------------------------------------

    @property
    def in_memory(self) -> FileSeal:
        """See Seal. Memory holds the rows as they are; a file's key is drawn when it is written."""
        return CHECKSUMS

    def new_file(self, tenant: str) -> FileSeal:
        """See Seal. It has a key that no other file has."""
        identity, secret = self.keyring.current(tenant)
        which = base64.b64encode(self.hide("secret", "", json.dumps([tenant, identity]).encode())).decode()
        return FileCipher(self, which, secret, secrets.token_bytes(_SALT))

    def file(self, key: ChunkKey, metadata: Mapping[str, Any]) -> FileSeal:
        """See Seal."""
        check_sums(self.name, key, metadata)
        which, salt = str(metadata["secret"]), bytes.fromhex(metadata["salt"])
        named_secret = self.reveal("secret", "", base64.b64decode(which, validate=True))
        if named_secret is None or len(salt) != _SALT:
            raise DamagedChunkError(f"chunk {key}: the file was not encrypted by this store")
        tenant, identity = json.loads(named_secret)
        try:
            return FileCipher(self, which, self.keyring.secret(tenant, identity), salt)
        except DamagedChunkError as error:
            raise type(error)(f"chunk {key}: {error}") from error

    def chunk_name(self, key: ChunkKey) -> str:
        """See Seal. The key, which is a hash of the chunk's text among other things, encrypted: whoever has the text can't make the name."""
        return self._names.encrypt(bytes.fromhex(key.digest), [b"chunk"]).hex()

    def chunk_key(self, name: str) -> ChunkKey:
        """See Seal."""
        try:
            raw = bytes.fromhex(name)
            if raw.hex() == name:
                return ChunkKey(self._names.decrypt(raw, [b"chunk"]).hex())
        except (InvalidTag, ValueError):
            pass
        raise ValueError(f"{name!r:.200} is the name of no chunk of this store")

    # -- names of other things ----------------------------------------------------------------------------------------

    def index_name(self, name: str) -> str:
        """See Seal."""
        kind, _, digest = name.partition("/")
        return f"{kind}/{self.chunk_name(ChunkKey(digest))}" if kind in _BY_CHUNK and digest else name

    def plain_index_name(self, name: str) -> str:
        """See Seal."""
        kind, _, hidden = name.partition("/")
        return f"{kind}/{self.chunk_key(hidden)}" if kind in _BY_CHUNK and hidden else name

    def hashed(self, kind: str, text: str) -> str:
        """See Seal. A keyed hash."""
        return hmac.digest(self._hashes, named(kind) + bytes_of(text), "sha256").hex()

    def rehashed(self, kind: str, digest: str) -> str:
        """See Seal. A keyed hash."""
        return self.hashed(f"{kind} digest", digest)

    # -- small records ------------------------------------------------------------------------------------------------

    def wrap(self, kind: str, name: str, content: bytes, tenant: str | None = None) -> bytes:
        """See Seal."""
        if tenant is not None:
            content = self.keyring.hide(tenant, named(kind) + bytes_of(name), content)
        return self.hide(kind, name, content)

    def unwrap(self, kind: str, name: str, raw: bytes, tenant: str | None = None) -> bytes | None:
        """See Seal."""
        content = self.reveal(kind, name, raw)
        if content is None or tenant is None:
            return content
        return self.keyring.reveal(tenant, named(kind) + bytes_of(name), content)

    def hide_text(self, tenant: str, key: ChunkKey, text: str) -> str:
        """See Seal."""
        raw = self.keyring.hide(tenant, named("text") + key.digest.encode(), bytes_of(text))
        return json.dumps([tenant, base64.b64encode(raw).decode()])

    def reveal_text(self, key: ChunkKey, hidden: str) -> str | None:
        """See Seal."""
        tenant, raw = json.loads(hidden)
        content = self.keyring.reveal(tenant, named("text") + key.digest.encode(), base64.b64decode(raw))
        return None if content is None else content.decode("utf-8", "surrogatepass")

    def stamp(self, kind: str, name: str, text: str) -> str:
        """See Seal."""
        return base64.b64encode(self.hide(kind, name, bytes_of(text))).decode()

    def unstamp(self, kind: str, name: str, raw: str) -> str | None:
        """See Seal."""
        try:
            content = self.reveal(kind, name, base64.b64decode(raw, validate=True))
        except (binascii.Error, ValueError):
            return None
        return None if content is None else content.decode("utf-8", "surrogatepass")

    def hide(self, kind: str, name: str, content: bytes) -> bytes:
        """See Seal."""
        nonce = os.urandom(_NONCE)
        return nonce + self._siv(kind).encrypt(content, [named(name), nonce])

    def reveal(self, kind: str, name: str, raw: bytes) -> bytes | None:
        """See Seal."""
        try:
            return self._siv(kind).decrypt(raw[_NONCE:], [named(name), raw[:_NONCE]])
        except (InvalidTag, ValueError):
            return None

    def _siv(self, kind: str) -> AESSIV:
        return self._hidden.get(kind) or self._hidden.setdefault(kind, AESSIV(self.key(f"hidden {kind}", 64)))


class FileCipher(FileSeal):
    """AES-256-GCM with a key that belongs to one file.

    Args:
        store: the store's seal.
        which: what the header says of the secret.
        secret: the tenant's secret.
        salt: the file's random bytes.
    """

    words = 2
    hides = True

    def __init__(self, store: Encryption, which: str, secret: bytes, salt: bytes) -> None:
        self._store = store
        self._key = AES(hkdf(secret, salt=salt, info=b"cachetune/chunk file"))
        self.metadata = {"sums": ENCRYPTED, "secret": which, "salt": salt.hex()}

    def __repr__(self) -> str:
        return "FileCipher(...)"

    def rows(
        self, key: ChunkKey, layer: int, block: int, rows: memoryview, into: memoryview | None = None
    ) -> int | tuple[int, ...]:
        """See FileSeal."""
        assert into is not None
        return struct.unpack("<2Q", self._close((layer, block), rows, into))

    def matches(
        self, key: ChunkKey, layer: int, block: int, found: memoryview, expected: Any, into: memoryview | None = None
    ) -> bool:
        """See FileSeal."""
        assert into is not None
        return self._open((layer, block), found, struct.pack("<2Q", *expected), into)

    def head(self, key: ChunkKey, front: Buffer, small: Buffer) -> tuple[bytes, Buffer]:
        """See FileSeal."""
        into = memoryview(bytearray(len(small)))
        return self._close((_HEAD, 0), small, into, _about(key, front)), into

    def open_head(self, key: ChunkKey, front: Buffer, digest: Buffer, found: memoryview) -> memoryview | None:
        """See FileSeal."""
        into = memoryview(np.empty(len(found), np.uint8).data)
        return into if self._open((_HEAD, 0), found, bytes(digest), into, _about(key, front)) else None

    def chunk_name(self, key: ChunkKey) -> str:
        """See FileSeal."""
        return self._store.chunk_name(key)

    def hide_namespace(self, text: str) -> str:
        """See FileSeal."""
        content = bytes_of(text)
        into = bytearray(len(content))
        tag = self._close((_HEAD, 1), content, memoryview(into))
        return base64.b64encode(bytes(into) + tag).decode()

    def reveal_namespace(self, text: str) -> str:
        """See FileSeal."""
        raw = base64.b64decode(text, validate=True)
        into = bytearray(max(0, len(raw) - 16))
        if not self._open((_HEAD, 1), raw[:-16], raw[-16:], memoryview(into)):
            raise ValueError("a text of the header was not written with the file's key")
        return into.decode("utf-8", "surrogatepass")

    def _close(self, place: tuple[int, int], plain: Buffer, into: memoryview, about: bytes = b"") -> bytes:
        """Encrypt `plain` into `into`. Returns the tag. Each place is closed once only."""
        cipher = Cipher(self._key, GCM(_nonce(place))).encryptor()
        cipher.authenticate_additional_data(about)
        cipher.update_into(plain, into)
        cipher.finalize()
        return cipher.tag

    def _open(self, place: tuple[int, int], found: Buffer, tag: bytes, into: memoryview, about: bytes = b"") -> bool:
        """Decrypt `found` into `into`. Returns whether it is what was written in this place."""
        try:
            cipher = Cipher(self._key, GCM(_nonce(place), tag)).decryptor()
            cipher.authenticate_additional_data(about)
            cipher.update_into(found, into)
            cipher.finalize()
        except (InvalidTag, ValueError):
            return False
        return True


def _nonce(place: tuple[int, int]) -> bytes:
    return struct.pack("<IQ", *place)


def _about(key: ChunkKey, front: Buffer) -> bytes:
    """What a head's tag is over besides: which chunk it is, and the header."""
    return struct.pack("<64sQ", key.digest.encode(), len(front)) + bytes(front)
