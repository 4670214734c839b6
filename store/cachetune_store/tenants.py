"""The secrets of an encrypted store's tenants. Each is drawn at random, and kept as a note that the store's root key protects.

It isn't derived from the root key, because then it could always be derived again. So when a tenant is deleted and its secrets with it, nobody
can read what was written with them any more, not even from an old copy of a chunk file. It is also noted how often a tenant was deleted, and
each secret says how often it had been before. So a copy of a secret that comes back, from a backup or from another machine's folder, isn't used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESSIV

from .encryption import Keyring
from .errors import DamagedChunkError, ErasedChunkError, RemoteError, StoreKeyError, StorePathError
from .notes import Notes
from .printing import shown
from .storekey import hkdf

__all__ = ["TenantSecrets"]

_ERASED = b'{"erased":'
"""How a note begins of which the secret was erased."""
_log = logging.getLogger(__name__)
_ID, _LIFE = 32, 8
"""Characters of a secret's id, and of these the first, which say how often the tenant had been deleted when the secret was drawn."""
_AT_ONCE = 16
"""Most notes that are asked for at the same time."""
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
        self._marks: Path | None = None
        self._told = self._epoch = 0
        self._seen: tuple[int, ...] = ()

    def connect(self, notes: Notes, folder: Path | None) -> None:
        """Say where the secrets are kept.

        Args:
            notes: those of nothing else.
            folder: where they are on disk; None: nowhere. By a file there, processes see that another one has erased a secret.
        """
        self._connected = notes
        self._marks = None if folder is None else folder / "erasures"
        self._seen = self._changed()

    def current(self, tenant: str) -> tuple[str, bytes]:
        """See Keyring. The first one of a tenant is drawn."""
        self.look()
        return (self._known.get(tenant) or self._load(tenant) or self._draw(tenant))[-1]

    def secret(self, tenant: str, identity: str) -> bytes:
        """See Keyring."""
        self.look()
        for known, secret in self._known.get(tenant, []):
            if known == identity:
                return secret
        try:
            found = dict(self._load(tenant, surely=True)).get(identity)
        except (RemoteError, StoreKeyError) as error:
            if not self._is_erased(tenant, identity):
                raise StoreKeyError(f"a tenant's secret isn't here, and can't be asked for now: {error}") from error
            found = None
        if found is not None:
            return found
        if self._is_erased(tenant, identity):
            raise ErasedChunkError("it was written for a tenant that was deleted since, and can't be read any more")
        raise DamagedChunkError("it was written with a tenant's secret that is lost, so it can't be read any more")

    def renew(self, tenant: str) -> None:
        """Draw another secret for what is written from now on. What is there stays readable."""
        self._load(tenant)
        self._draw(tenant)

    def life(self, tenant: str) -> str:
        """What stands for all that was written for a tenant since it was deleted last, as `erased_elsewhere` takes it.

        Raises:
            RemoteError, StoreKeyError: a shared place that may say otherwise can't be asked.
        """
        return f"{self._lives(self._notes.get_surely, tenant):0{_LIFE}x}".ljust(_ID, "0")

    def erase(self, tenant: str) -> None:
        """Make all unreadable that was ever written for a tenant, for good.

        Raises:
            StorePathError: that can't be written now. Do it again.
        """
        get = self._notes.get_surely
        # Whatever secret of this life comes back, or can't be read now, is erased by this alone.
        self._notes.write_first(tenant, _name("erased life", str(self._lives(get, tenant))), b"erased")
        for name, content in self._stored(get, tenant):
            parsed = _parsed(content)
            # One that was drawn meanwhile is for what is written after the deletion.
            if not content.startswith(_ERASED) and (parsed is None or self._is_erased(tenant, parsed[0])):
                self._notes.replace(tenant, name, _erased(parsed))
        self._mark()
        self._forget([tenant])
        self._forgotten(tenant)

    def erased_elsewhere(self, tenant: str, identity: str) -> None:
        """Another machine has deleted a tenant of this `life`: it is so here as well, also when the shared place doesn't answer.

        `look` does the rest.
        """
        here = self._notes.here
        for number in range(_life_of(identity) + 1):
            if here.get(tenant, name := _name("erased life", str(number))) is None:
                here.write_first(tenant, name, b"erased")
        for name, content in self._stored(here.get, tenant):
            parsed = _parsed(content)
            if parsed is not None and _life_of(parsed[0]) <= _life_of(identity):
                here.replace(tenant, name, _erased(parsed))
        self._mark()
        self._told += 1

    def is_wanted(self, tenant: str, content: bytes) -> bool:
        """Whether a note that only this machine has may be written to the shared place. An erased secret may not."""
        parsed = _parsed(content)
        return parsed is None or not self._is_erased(tenant, parsed[0])

    def look(self) -> None:
        """See whether a secret was erased by another process or machine. This takes a microsecond or two."""
        if (now := self._changed()) == self._seen:
            return
        self._seen = now
        # Whoever erased it, it is noted here: so nothing is asked of a shared place, which would take a request for each tenant.
        here = self._notes.here.get
        gone = []
        for tenant, held in list(self._known.items()):
            lives = self._lives(here, tenant)
            if any(_life_of(identity) < lives for identity, _ in held):
                gone.append(tenant)
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
        except ErasedChunkError:
            raise
        except (InvalidTag, ValueError, DamagedChunkError):
            return None

    # -- notes ---------------------------------------------------------------------------------------------------------

    @property
    def _notes(self) -> Notes:
        assert self._connected is not None, "secrets are asked for before it is known where they are"
        return self._connected

    def _load(self, tenant: str, *, surely: bool = False) -> list[_Secret]:
        """The secrets of a tenant that hold, the oldest first. Those that were erased are taken out of their notes, if they have come back.

        Raises:
            RemoteError, StoreKeyError: only with `surely`, if a shared place that may have others can't be asked.
        """
        epoch, get = self._epoch, self._notes.get_surely if surely else self._notes.get
        lives, held = self._lives(get, tenant), []
        for name, content in self._stored(get, tenant):
            parsed = _parsed(content)
            if parsed is None:
                if not content.startswith(_ERASED):
                    _log.error(
                        "a secret of tenant %s is damaged, so what was written with it can't be read; put its file back from a backup, or "
                        "precompute again",
                        shown(tenant),
                    )
            elif _life_of(parsed[0]) < lives:
                # First here. A place that doesn't answer is told the next time.
                with contextlib.suppress(StorePathError):
                    self._notes.replace(tenant, name, _erased(parsed))
            else:
                held.append(parsed)
        with self._lock:
            if epoch == self._epoch:  # otherwise what was read may have been erased since
                self._known[tenant] = held
        return held

    def _stored(
        self, get: Callable[[str, str], bytes | None], tenant: str, kind: str = "secret"
    ) -> Iterator[tuple[str, bytes]]:
        """Name and content of each note of one kind, the oldest first. None is ever removed, so they are found by counting.

        In a shared place each takes a request, so more and more are asked for at once.
        """
        number, count = 0, 1
        while True:
            names = [_name(kind, str(number + step)) for step in range(count)]
            for name, content in zip(names, self._asked(get, tenant, names), strict=False):
                if content is None:
                    return
                yield name, content
            number, count = number + count, min(_AT_ONCE, number + count)

    def _asked(self, get: Callable[[str, str], bytes | None], tenant: str, names: list[str]) -> Iterable[bytes | None]:
        """The notes of these names, each when it is wanted, or all at once where that saves waiting."""
        here = self._notes.here
        if len(names) == 1 or here is self._notes or get == here.get:
            return (get(tenant, name) for name in names)
        with ThreadPoolExecutor(len(names), "cachetune-secrets") as threads:
            return list(threads.map(partial(get, tenant), names))

    def _draw(self, tenant: str) -> list[_Secret]:
        """The secrets of a tenant, with another one."""
        number = sum(1 for _ in self._stored(self._notes.get, tenant))
        life = self._lives(self._notes.get, tenant)
        identity = f"{life:0{_LIFE}x}{secrets.token_hex((_ID - _LIFE) // 2)}"
        content = json.dumps({"id": identity, "secret": secrets.token_hex(32)}).encode()
        self._notes.write_first(tenant, _name("secret", str(number)), content)
        if not (held := self._load(tenant)):
            raise StorePathError(f"the secret of tenant {shown(tenant)} can't be written; try again")
        return held

    def _is_erased(self, tenant: str, identity: str) -> bool:
        return _life_of(identity) < self._lives(self._notes.get, tenant)

    def _lives(self, get: Callable[[str, str], bytes | None], tenant: str) -> int:
        """How often a tenant was deleted."""
        return sum(1 for _ in self._stored(get, tenant, "erased life"))

    def _mark(self) -> None:
        """Let other processes see that something was erased: the file gets longer."""
        if self._marks is not None:
            fd = os.open(self._marks, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            with os.fdopen(fd, "ab") as file:
                file.write(b".")

    def _forget(self, tenants: list[str]) -> None:
        with self._lock:
            self._epoch += 1
            for tenant in tenants:
                self._known.pop(tenant, None)

    def _changed(self) -> tuple[int, ...]:
        """Numbers that change when a secret was erased."""
        if self._marks is None:
            return (self._told,)
        try:
            status = os.stat(self._marks)  # noqa: PTH116 (a Path would take longer)
            return self._told, status.st_ino, status.st_size, status.st_ctime_ns
        except FileNotFoundError:
            return (self._told,)


def _parsed(content: bytes) -> tuple[str, bytes] | None:
    """Id and secret of a note; None if it is none."""
    try:
        record = json.loads(content)
        identity, secret = record["id"], bytes.fromhex(record["secret"])
        return (identity, secret) if len(identity) == _ID and bytes.fromhex(identity) and len(secret) == 32 else None
    except (ValueError, TypeError, KeyError):
        return None


def _erased(secret: _Secret | None) -> bytes:
    """What stands in the place of a secret that was erased; None: of one that couldn't be read."""
    return json.dumps({"erased": "" if secret is None else secret[0]}).encode()


def _life_of(identity: str) -> int:
    """How often the tenant had been deleted when a secret was drawn."""
    return int(identity[:_LIFE], 16)


def _name(kind: str, which: str) -> str:
    return hashlib.sha256(f"cachetune {kind}/{which}".encode()).hexdigest()


def _siv(secret: bytes) -> AESSIV:
    return AESSIV(hkdf(secret, info=b"cachetune/record", length=64))
