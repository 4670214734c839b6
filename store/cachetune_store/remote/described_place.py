"""A shared place as its description (store.json) says it is: whether it holds a store that this one can share, and what protects it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..description import FORMAT, MOST_BYTES, Description, check_encrypted, no_key, no_keyring
from ..errors import StoreKeyError, StoreVersionError
from ..keys import FORMAT_VERSION
from ..seals import CHECKSUMS, Seal
from ..storekey import StoreKey
from .objects import Objects

if TYPE_CHECKING:
    from ..encryption import Keyring

__all__ = ["DescribedPlace"]

_PARTS = ("changes/", "snapshots/", "chunks/", "notes/", "secrets/")

_log = logging.getLogger(__name__)


class DescribedPlace:
    """Reads a place's description, and writes it where there is none.

    Args:
        objects: the place.
        key: the store's key, with which the place was made, too; None if it has none.
        encrypted: whether the place must be encrypted, and is made so if it is empty; None: it is as it is, and not encrypted if it is empty.
        keyring: makes what has the secrets of tenants, if the place is encrypted.

    Attributes:
        seal: what the sums of objects there are made and checked with, as far as the place was asked for it (`seal_is_known`).
    """

    def __init__(
        self,
        objects: Objects,
        key: StoreKey | None = None,
        encrypted: bool | None = None,
        keyring: Callable[[], Keyring] = no_keyring,
    ) -> None:
        self._objects, self._key, self._encrypted, self._keyring = objects, key, encrypted, keyring
        self.seal: Seal = CHECKSUMS
        self._sealed = ""  # the id of the place that the seal is of

    @property
    def seal_is_known(self) -> bool:
        """Whether the place need not be asked for its seal."""
        return self._key is None or self.seal is not CHECKSUMS

    def enter(self) -> str:
        """Make sure that the place holds a store of this format, and make it one if it is empty. Returns its id.

        Raises:
            StoreVersionError: it holds something else.
            StoreKeyError: it was made with another key, or without one.
            RemoteError: it can't be used.
        """
        described = self._description()
        identity = described.identity
        if self._encrypted is None and described.encrypted:
            self._encrypted = True  # remembered: should somebody delete all of the place, it is made anew encrypted
        if self._encrypted:
            check_encrypted(described, self._objects.place)
        elif self._encrypted is False and described.encrypted:
            raise StoreKeyError(
                f"{self._objects.place} is encrypted, and the folder before it isn't, where all would be readable: give a folder that doesn't exist "
                "yet, without encrypt=False, or the place's URL as the store's path, which keeps nothing on disk"
            )
        if self._key is None or identity != self._sealed:
            # What is known of a place's root key stays true if others have given the place another key meanwhile.
            self.seal, self._sealed = described.seal(self._key, self._objects.place, self._keyring), identity
        return identity

    def change_key(self, new: StoreKey) -> None:
        """Protect the place's root key with another key from now on.

        Raises:
            StoreKeyError: the place has no key, or another one than this store by now.
            RemoteError: it can't be used.
        """
        if self._key is None:
            raise no_key(self._objects.place)
        described = self._description().with_key(self._key, new, self._objects.place)
        self._objects.put("store.json", [described.content])
        self._key = new

    def _description(self) -> Description:
        """What the place says of itself. If it says nothing, it is made a store.

        Raises:
            StoreKeyError: it says nothing, and holds what only the lost description's root key could tell from forged data.
        """
        raw = self._objects.get("store.json", MOST_BYTES)
        if raw is None and self._key is not None and self._holds_something():
            raw = self._objects.get("store.json", MOST_BYTES)  # another machine may have been first
            if raw is None:
                raise StoreKeyError(
                    f"{self._objects.place}/store.json is gone, and what a store wrote is there: without it, the key can't tell whether that is "
                    "the store's own. Put the object back, or delete all that is below this prefix and precompute again"
                )
        if raw is None:
            described = Description.new(self._key, encrypted=bool(self._encrypted))
            if self._objects.put("store.json", [described.content], create=True):
                self._say_what_is_open()
            raw = self._objects.get("store.json", MOST_BYTES)
        try:
            found = Description.read(raw or b"")
            if found.format != FORMAT or not found.identity:
                raise ValueError(f"format is {found.format!r}")
        except ValueError as error:
            raise StoreVersionError(
                f"{self._objects.place}/store.json is not that of a store; give another prefix, or delete what is below this one"
            ) from error
        if not found.is_known:
            raise StoreVersionError(
                f"{self._objects.place} holds a store of format version {found.version!r}; this release reads version {FORMAT_VERSION}: "
                "give another prefix and precompute again"
            )
        return found

    def _say_what_is_open(self) -> None:
        """Warn of what others can do in a place. It is said once, when the place is made: whether it has a key and is encrypted never changes."""
        if self._key is None:
            _log.warning(
                "%s is a new shared place without a key: whoever may write to it can change what all machines answer, and whoever may read it "
                "can read the documents. If that must not be, make another one with store_key= and encrypt=True (docs/scale.md)",
                self._objects.place,
            )
        elif not self._encrypted:
            _log.warning(
                "%s is a new shared place with a key, but not encrypted: whoever may read it can read the documents. If that must not be, make "
                "another one with encrypt=True (docs/scale.md)",
                self._objects.place,
            )

    def _holds_something(self) -> bool:
        return any(next(iter(self._objects.names(prefix)), None) is not None for prefix in _PARTS)
