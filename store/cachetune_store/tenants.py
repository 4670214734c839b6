"""The secrets of an encrypted store's tenants. Each is drawn at random, and kept as a note that the store's root key protects.

It isn't derived from the root key, because then it could always be derived again. So when a tenant is deleted and its secrets with it, nobody
can read what was written with them any more, not even from an old copy of a chunk file. What was erased is also noted by its id, so that a
copy of a secret that comes back, from a backup or from another machine's folder, isn't used.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import threading
from collections.abc import Callable
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESSIV

from .encryption import Keyring
from .errors import DamagedChunkError, ErasedChunkError, StoreKeyError, StorePathError
from .notes import Notes
from .printing import shown
from .storekey import hkdf

__all__ = ["TenantSecrets"]

_ID = 32
"""Characters of a secret's id."""
_Secret = tuple[str, bytes]
"""A secret's id, and itself."""


class TenantSecrets(Keyring):
    """Finds, draws and erases tenants' secrets. Safe to use from several threads.

    Nothing waits for a file or a shared place while the lock is held: who asks for a secret may hold locks that those need.

    Args:
        forgotten: called with a tenant whose secrets were erased, by whomever: what is in memory of it has to go.
    """

    def __init__(self, forgotten: Callable[[str], None]) -> None:
        self._forgotten = forgotten
        self._lock = threading.Lock()
        self._connected: Notes | None = None
        self._known: dict[str, list[_Secret]] = {}
        self._folder: Path | None = None
        self._seen = self._told = 0
        self._epoch = 0

    def connect(self, notes: Notes, folder: Path | None) -> None:
        """Say where the secrets are kept.

        Args:
            notes: those of nothing else.
            folder: where notes without a tenant are on disk; None: nowhere. Its time changes when another process has erased a secret.
        """
        self._connected, self._folder = notes, folder
        self._seen = self._changed()

    def current(self, tenant: str) -> tuple[str, bytes]:
        """See Keyring. The first one of a tenant is drawn."""
        self.look()
        return (self._known.get(tenant) or self._load(tenant) or self._draw(tenant))[-1]

    def secret(self, tenant: str, identity: str) -> bytes:
        """See Keyring."""
        self.look()
        for held in (self._known.get(tenant, []), None):
            for known, secret in self._load(tenant) if held is None else held:
                if known == identity:
                    return secret
        if self._is_erased(identity):
            raise ErasedChunkError("it was written for a tenant that was deleted since, and can't be read any more")
        if not self._notes.reachable:
            raise StoreKeyError(
                "a tenant's secret isn't here, and the shared place doesn't answer; try again when it does"
            )
        raise DamagedChunkError("it was written with a tenant's secret that is lost, so it can't be read any more")

    def renew(self, tenant: str) -> None:
        """Draw another secret for what is written from now on. What is there stays readable."""
        self._load(tenant)
        self._draw(tenant)

    def identities(self, tenant: str) -> list[str]:
        """Ids of a tenant's secrets."""
        return [identity for identity, _ in self._load(tenant)]

    def erase(self, tenant: str) -> None:
        """Make all unreadable that was ever written for a tenant, for good.

        Raises:
            StorePathError: that can't be written now. Do it again.
        """
        erased = self.identities(tenant)
        for identity in erased:
            self._notes.write_first("", _name("erased", identity), b"erased")
        self._load(tenant)  # which deletes them
        self._forget([tenant])
        self._forgotten(tenant)

    def erased_elsewhere(self, tenant: str, identity: str) -> None:
        """Another machine has erased a secret: it is so here as well, also when the shared place doesn't answer. `look` does the rest."""
        here = self._notes.here
        if here.get("", name := _name("erased", identity)) is None:
            here.write_first("", name, b"erased")
        number = 0
        while (content := here.get(tenant, _name("secret", str(number)))) is not None:
            if (parsed := _parsed(content)) is not None and parsed[0] == identity:
                here.delete(tenant, _name("secret", str(number)))
            number += 1
        self._told += 1

    def is_wanted(self, content: bytes) -> bool:
        """Whether a note that only this machine has may be written to the shared place. An erased secret may not."""
        parsed = _parsed(content)
        return parsed is None or not self._is_erased(parsed[0])

    def look(self) -> None:
        """See whether a secret was erased by another process or machine. This takes a microsecond or two."""
        if (now := self._changed()) == self._seen:
            return
        self._seen = now
        gone = [tenant for tenant, held in list(self._known.items()) if any(self._is_erased(each) for each, _ in held)]
        self._forget(gone)
        for tenant in gone:
            self._forgotten(tenant)

    # -- what nobody can read any more once the tenant is deleted ------------------------------------------------------

    def hide(self, tenant: str, about: bytes, content: bytes) -> bytes:
        """See Keyring."""
        identity, secret = self.current(tenant)
        return identity.encode() + _siv(secret).encrypt(content, [about])

    def reveal(self, tenant: str, about: bytes, raw: bytes) -> bytes | None:
        """See Keyring."""
        try:
            return _siv(self.secret(tenant, raw[:_ID].decode())).decrypt(raw[_ID:], [about])
        except (InvalidTag, ValueError, DamagedChunkError):
            return None

    # -- notes ---------------------------------------------------------------------------------------------------------

    @property
    def _notes(self) -> Notes:
        assert self._connected is not None, "secrets are asked for before it is known where they are"
        return self._connected

    def _load(self, tenant: str) -> list[_Secret]:
        """The secrets of a tenant, the oldest first. The last ones are deleted if they were erased and are still there, or have come back."""
        epoch = self._epoch
        found: list[_Secret | None] = []
        while (content := self._notes.get(tenant, _name("secret", str(len(found))))) is not None:
            parsed = _parsed(content)
            found.append(None if parsed is None or self._is_erased(parsed[0]) else parsed)
        # Only the last ones: the others are found by counting.
        while found and found[-1] is None:
            found.pop()
            self._notes.delete(tenant, _name("secret", str(len(found))))
        held = [each for each in found if each is not None]
        with self._lock:
            if epoch == self._epoch:  # otherwise what was read may have been erased since
                self._known[tenant] = held
        return held

    def _draw(self, tenant: str) -> list[_Secret]:
        """The secrets of a tenant, with another one."""
        number = 0
        while self._notes.get(tenant, _name("secret", str(number))) is not None:
            number += 1
        content = json.dumps({"id": secrets.token_hex(_ID // 2), "secret": secrets.token_hex(32)}).encode()
        self._notes.write_first(tenant, _name("secret", str(number)), content)
        if not (held := self._load(tenant)):
            raise StorePathError(f"the secret of tenant {shown(tenant)} can't be written; try again")
        return held

    def _is_erased(self, identity: str) -> bool:
        return self._notes.get("", _name("erased", identity)) is not None

    def _forget(self, tenants: list[str]) -> None:
        with self._lock:
            self._epoch += 1
            for tenant in tenants:
                self._known.pop(tenant, None)

    def _changed(self) -> int:
        """A number that changes when a secret was erased."""
        if self._folder is None:
            return self._told
        try:
            return os.stat(self._folder).st_mtime_ns + self._told  # noqa: PTH116 (a Path would take longer)
        except FileNotFoundError:
            return self._told


def _parsed(content: bytes) -> tuple[str, bytes] | None:
    """Id and secret of a note; None if it is none."""
    try:
        record = json.loads(content)
        identity, secret = record["id"], bytes.fromhex(record["secret"])
        return (identity, secret) if len(identity) == _ID and bytes.fromhex(identity) and len(secret) == 32 else None
    except (ValueError, TypeError, KeyError):
        return None


def _name(kind: str, which: str) -> str:
    return hashlib.sha256(f"cachetune {kind}/{which}".encode()).hexdigest()


def _siv(secret: bytes) -> AESSIV:
    return AESSIV(hkdf(secret, info=b"cachetune/record", length=64))
