"""A store's key, as its user gives it, and the root key that it protects.

A store made with a key draws a random root key, from which all others are derived. Its description (store.json) holds the root key, encrypted
with the user's key ("wrapped"). So another user's key needs only another description, and no file is written again.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import StoreArgumentError, StoreKeyError
from .printing import shown

__all__ = ["ENCRYPTED", "KEYED", "GivenKey", "StoreKey", "hkdf"]

KEYED, ENCRYPTED = "hmac-sha256", "aes-256-gcm"
"""What a store with a key does: it makes keyed hashes, or it encrypts."""

_LEAST = 32
_MOST = 4096
_BYTES = 32
_LOOKS_LIKE_ONE = re.compile(r"[0-9A-Za-z+/=_-]{32,}")
_TEXT = bytes(range(9, 14)) + bytes(range(32, 127))
"""Bytes of a text, its white space included."""


class StoreKey:
    """A secret of at least 32 bytes. Neither its text nor its representation shows it.

    Args:
        secret: the bytes.
    """

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    @classmethod
    def given(cls, key: object) -> StoreKey | None:
        """The key that a user gave; None if none was given.

        Raises:
            StoreArgumentError: it is not of a kind that can be given, can't be read, or is too short.
        """
        if key is None or isinstance(key, StoreKey):
            return key
        if isinstance(key, bytes):
            return cls(_checked(_stripped(key), "store_key"))
        if not isinstance(key, str | os.PathLike) or not os.fspath(key):
            raise StoreArgumentError(
                f"store_key is of type {type(key).__name__}; use bytes, the path of a file, or env:NAME for an environment variable"
            )
        where = os.fspath(key)
        if isinstance(where, str) and where.startswith("env:"):
            name = where.removeprefix("env:")
            value = os.environ.get(name)
            if value is None:
                raise StoreArgumentError(
                    f"store_key is {shown(where)}, and there is no such environment variable; set it"
                )
            return cls(_checked(_stripped(os.fsencode(value)), f"the environment variable {name}"))
        return cls(_checked(_stripped(_content(where)), f"the file {where}"))

    def __repr__(self) -> str:
        return "StoreKey(...)"

    def wrap(self, root: bytes, identity: str, method: str = KEYED) -> dict[str, str]:
        """What the description of the store `identity` says of its root key, and of what it does with it."""
        salt = secrets.token_bytes(_BYTES)
        wrapped = bytes(a ^ b for a, b in zip(root, self._part(salt, b"pad", identity, method), strict=True))
        return {
            "method": method,
            "salt": salt.hex(),
            "check": self._part(salt, b"check", identity, method).hex(),
            "root": wrapped.hex(),
            "digest": hmac.digest(self._part(salt, b"digest", identity, method), wrapped, "sha256").hex(),
        }

    def unwrap(self, described: Mapping[str, Any], identity: str, place: str, method: str = KEYED) -> bytes:
        """The root key of a store.

        Args:
            described: what its description says of it.
            identity: the store's id.
            place: the store, for messages.
            method: what the store does with it.

        Raises:
            StoreKeyError: this is not the key that it was wrapped with, or the description was changed.
        """
        try:
            if described["method"] != method:
                raise ValueError
            salt, check, wrapped, digest = (
                bytes.fromhex(described[name]) for name in ("salt", "check", "root", "digest")
            )
            if len(wrapped) != _BYTES:
                raise ValueError
        except (ValueError, TypeError, KeyError) as error:
            raise StoreKeyError(
                f"what {place} says of its key is damaged; put its store.json back as it was when the store was made"
            ) from error
        if not hmac.compare_digest(check, self._part(salt, b"check", identity, method)):
            raise StoreKeyError(
                f"{place} was made with another key than store_key: give the key that it was made with, or was last given (`cachetune "
                "change-key`). If that is lost, nothing of the store can be used any more: delete it, and precompute again"
            )
        if not hmac.compare_digest(
            digest, hmac.digest(self._part(salt, b"digest", identity, method), wrapped, "sha256")
        ):
            raise StoreKeyError(
                f"what {place} says of its key was changed; put its store.json back as it was when the store was made"
            )
        return bytes(a ^ b for a, b in zip(wrapped, self._part(salt, b"pad", identity, method), strict=True))

    def _part(self, salt: bytes, purpose: bytes, identity: str, method: str) -> bytes:
        """A key for one purpose. The salt is drawn anew each time, so a pad covers one root key only.

        The method is in it: a description that was changed to say that the store isn't encrypted opens with no key.
        """
        word = b"encrypted " if method == ENCRYPTED else b""
        return hkdf(
            self._secret,
            salt=salt,
            info=b"cachetune " + word + b"store key/" + purpose + b"/" + identity.encode("utf-8", "surrogatepass"),
        )


GivenKey = bytes | str | os.PathLike[str] | StoreKey | None
"""How a key is given: itself, the path of the file that holds it, or "env:NAME", the environment variable that does."""


def hkdf(secret: bytes, *, salt: bytes = b"", info: bytes, length: int = _BYTES) -> bytes:
    """HKDF (RFC 5869) with SHA-256: a key for the purpose `info`."""
    extracted = hmac.digest(salt or bytes(hashlib.sha256().digest_size), secret, "sha256")
    found, block = b"", b""
    for number in range(1, -(-length // 32) + 1):
        block = hmac.digest(extracted, block + info + bytes([number]), "sha256")
        found += block
    return found[:length]


def _content(path: str | bytes) -> bytes:
    """A key file's content. It may be a link: whoever starts the program has named it."""
    if isinstance(path, str) and _LOOKS_LIKE_ONE.fullmatch(path) and not os.path.lexists(path):
        # Not shown: such messages end up in logs.
        raise StoreArgumentError(
            f"store_key is a text of {len(path)} characters that names no file, and looks like a key: give the path of a file that holds the "
            "key, env:NAME for an environment variable, or bytes"
        )
    try:
        with contextlib.closing(os.fdopen(os.open(Path(os.fsdecode(path)).expanduser(), os.O_RDONLY), "rb")) as file:
            return file.read(_MOST + 1)
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StoreArgumentError(
            f"store_key is {shown(os.fsdecode(path))}, a file that can't be read ({reason}); name one that holds the key, for example made by "
            "`openssl rand -hex 32`, or env:NAME for an environment variable"
        ) from error


def _stripped(content: bytes) -> bytes:
    """The content without white space around it, if it is a text: editors and shells end texts with a new line."""
    return content.strip() if not content.translate(None, _TEXT) else content


def _checked(secret: bytes, where: str) -> bytes:
    if not _LEAST <= len(secret) <= _MOST:
        raise StoreArgumentError(
            f"{where} has {len(secret)} bytes; a store's key has {_LEAST} to {_MOST}, drawn at random: `openssl rand -hex 32` makes one"
        )
    return secret
