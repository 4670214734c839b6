"""A store's description, `store.json`: that there is a store, of which format version, and which key it has if it has one.

A folder and a place that machines share have the same.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .errors import StoreArgumentError, StoreKeyError
from .keyed_hashes import KeyedHashes
from .keys import FORMAT_VERSION
from .seals import CHECKSUMS, Seal
from .storekey import ENCRYPTED, KEYED, StoreKey

if TYPE_CHECKING:
    from .encryption import Keyring

__all__ = ["FORMAT", "MOST_BYTES", "Description", "check_encrypted", "no_key", "no_keyring"]

FORMAT = "cachetune-store"
_VERSIONS = {FORMAT_VERSION: None, 2: KEYED, 3: ENCRYPTED}
"""What the stores of each version do with a key. A release refuses what it doesn't know. It would take all that is there for damaged."""
MOST_BYTES = 1 << 16
"""Longest description that is read."""


@dataclass(frozen=True)
class Description:
    """What a store says of itself.

    Attributes:
        version: its format version. Only one that `is_known` can be used.
        identity: the store's own id; "" if an early release made it.
        key: how its root key is wrapped; None if it has no key.
        format: "cachetune-store"; None if it says nothing.
    """

    version: Any
    identity: str
    key: Mapping[str, Any] | None
    format: Any = FORMAT

    @classmethod
    def new(cls, key: StoreKey | None, *, encrypted: bool = False) -> Description:
        """The description of a new store."""
        identity = uuid.uuid4().hex
        if key is None:
            return cls(FORMAT_VERSION, identity, None)
        method = ENCRYPTED if encrypted else KEYED
        version = next(each for each, does in _VERSIONS.items() if does == method)
        return cls(version, identity, key.wrap(secrets.token_bytes(32), identity, method))

    @classmethod
    def read(cls, content: bytes) -> Description:
        """What a file holds.

        Raises:
            ValueError: it is no description.
        """
        try:
            described = json.loads(content)
            version, key = described["version"], described.get("key")
            if version in _VERSIONS and isinstance(key, dict) != (_VERSIONS[version] is not None):
                raise ValueError("it must name its key if it has one, and only then")
            return cls(version, str(described.get("id", "")), key, described.get("format"))
        except (TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"it is no description ({error})") from error

    @property
    def is_known(self) -> bool:
        """Whether this release reads stores of its version."""
        return self.version in _VERSIONS

    @property
    def encrypted(self) -> bool:
        """Whether the store is encrypted."""
        return self.is_known and _VERSIONS[self.version] == ENCRYPTED

    @property
    def content(self) -> bytes:
        """What a file holds."""
        described: dict[str, Any] = {"format": FORMAT, "version": self.version, "id": self.identity}
        return json.dumps(described if self.key is None else described | {"key": dict(self.key)}).encode()

    def seal(self, key: StoreKey | None, place: str, keyring: Callable[[], Keyring]) -> Seal:
        """What closes and opens all that the store writes.

        Args:
            key: the key that was given for the store.
            place: the store, for messages.
            keyring: makes what has the secrets of tenants. Called if the store is encrypted.

        Raises:
            StoreKeyError: the store has a key and none was given, or another one; or a key was given, and it has none.
        """
        if self.key is None and key is None:
            return CHECKSUMS
        if key is None:
            raise StoreKeyError(
                f"{place} was made with a key, and none is given: give it as store_key (--store-key on the command line), as the path of the "
                "file that holds it, or as env:NAME for an environment variable"
            )
        root = self.root(key, place)
        if not self.encrypted:
            return KeyedHashes(root)
        try:
            from .encryption import Encryption

            return Encryption(root, keyring())
        except ImportError as error:
            raise StoreArgumentError(
                f"{place} is encrypted, which needs {error.name}, which is not installed: pip install 'cachetune-rag[encryption]'"
            ) from error

    def with_key(self, old: StoreKey, new: StoreKey, place: str) -> Description:
        """The description of the same store with another key; as it is, if it has that key already.

        Raises:
            StoreKeyError: the old one isn't the store's.
        """
        with contextlib.suppress(StoreKeyError):
            self.root(new, place)
            return self
        method = ENCRYPTED if self.encrypted else KEYED
        return Description(self.version, self.identity, new.wrap(self.root(old, place), self.identity, method))

    def root(self, key: StoreKey, place: str) -> bytes:
        """The root key.

        Raises:
            StoreKeyError: the store has none, or `key` isn't the store's.
        """
        if self.key is None:
            raise no_key(place)
        method = ENCRYPTED if self.encrypted else KEYED
        return key.unwrap(self.key, self.identity, place, method)


def check_encrypted(described: Description, place: str) -> None:
    """See that a store is encrypted, as was asked for.

    Raises:
        StoreKeyError: it isn't. It doesn't become so: what it holds would stay readable.
    """
    if not described.encrypted:
        raise StoreKeyError(
            f"encrypt is True, and {place} was made without encryption, which stays so: leave encrypt out, or make an encrypted store in another "
            "place and precompute again"
        )


def no_keyring() -> Keyring:
    """What stands for a keyring where nothing is encrypted."""
    raise AssertionError("this store is not encrypted")


def no_key(place: str) -> StoreKeyError:
    """The error for a key that is given for a store which was made without one."""
    return StoreKeyError(
        f"{place} was made without a key, so what it holds can't be told from what was forged: leave store_key out, or make a store with "
        "a key in another place and precompute again"
    )
