"""All that a store has of a remote place: the tier, the catalogue, the notes, and the thread that keeps them up to date."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..buffers import SlabPool
from ..chunk import Chunk
from ..description import MOST_BYTES, Description, no_keyring
from ..documents import Documents
from ..errors import RemoteError, RemoteRefusedError
from ..index import Index
from ..keys import ChunkKey
from ..notes import Notes
from ..storekey import StoreKey
from ..tiers.base import Pins
from ..tiers.remote import RemoteTier
from .catalogue import Catalogue
from .changes import Op
from .described_place import DescribedPlace
from .notes import SharedNotes
from .places import open_objects
from .sync import Sync

if TYPE_CHECKING:
    from ..encryption import Keyring

__all__ = ["Shared", "is_encrypted"]

_log = logging.getLogger(__name__)


class Shared:
    """What a store shares with others.

    Args:
        url: the place.
        timeout: seconds that a read may take.
        options: further arguments of the client that reaches the place.
        codec: how chunks are encoded there; None: as they come.
        index, documents, notes, pins, pool: the store's.
        behind: the store has a directory, which lasts as well. What changes is told to the others behind the caller's back then, over restarts
            too. Otherwise a change is told before the call that makes it returns.
        source: a chunk that is to be written to the place, from faster tiers; None if none has it.
        forget: deletes chunks from the tiers that others don't share.
        key: the store's key; None if it has none.
        encrypted: whether the place must be encrypted; None: it is as it is.
        keyring: makes what has the secrets of tenants, if the place is encrypted.
        erased: called with a tenant that another machine has deleted, and the life of which the secrets are erased; "" where it has none.

    Attributes:
        tier: the chunks there.
        notes: the notes, on which all agree.
    """

    def __init__(
        self,
        url: object,
        *,
        timeout: float,
        options: Mapping[str, Any],
        codec: str | None,
        index: Index,
        documents: Documents,
        notes: Notes,
        pins: Pins,
        pool: SlabPool,
        behind: bool,
        source: Callable[[ChunkKey], Chunk | None],
        forget: Callable[[Sequence[ChunkKey]], int],
        key: StoreKey | None = None,
        encrypted: bool | None = None,
        keyring: Callable[[], Keyring] = no_keyring,
        erased: Callable[[str, str], None] = lambda tenant, secret: None,
    ) -> None:
        objects = open_objects(url, timeout=timeout, options=options)
        self._index, self._behind = index, behind
        self.tier = RemoteTier(
            objects,
            index=index,
            pins=pins,
            pool=pool,
            codec=codec,
            behind=behind,
            source=source,
            catalogue=lambda upload: Catalogue(
                objects, DescribedPlace(objects, key, encrypted, keyring), index, documents, forget, upload, erased
            ),
        )
        self._objects = objects
        self.notes = self.shared(notes)
        self._sync: Sync | None = None

    def shared(self, notes: Notes, wanted: Callable[[str, bytes], bool] = lambda tenant, content: True) -> SharedNotes:
        """Notes on which all agree, from this machine's own. Arguments as for SharedNotes."""
        tier = self.tier
        return SharedNotes(notes, self._objects, tier.breaker, tier.failed, tier.catalogue.seal, wanted)

    def open(self, healed: Callable[[Callable[[], object]], object]) -> None:
        """Read what is in the place, and go on doing so in the background.

        A place that doesn't answer is no error: what it has is computed until it answers.

        Args:
            healed: calls a function and repairs the index if it turns out to be damaged.

        Raises:
            RemoteRefusedError: it refuses this user, or there is no such bucket.
            StoreVersionError: it holds something else than a store of this format version.
            StoreKeyError: it was made with another key, or without one.
        """
        self._sync = Sync(self.tier.catalogue, self.tier.breaker, healed, self.tier.failed)
        try:
            healed(lambda: self.tier.catalogue.catch_up(look_far=True))
        except RemoteRefusedError:
            raise
        except RemoteError as error:
            self.tier.failed(error)
            _log.warning("%s. What it has is computed until it answers", error)
        self._sync.start()

    def add(self, op: Op) -> None:
        """Something changes here, in the index's transaction that is open: the others are to be told."""
        self.tier.catalogue.add(op)

    def changed(self) -> None:
        """Something waits in the outbox, and no transaction is open: tell the others, now or soon.

        Raises:
            RemoteError: they had to be told now, and can't be. It is tried again in the background.
        """
        if self._sync is None:
            return
        if self._behind:
            self._sync.wake()
        else:
            try:
                self._sync.now()
            except RemoteError as error:
                self.tier.failed(error)
                raise

    def now(self) -> None:
        """Tell the others what changed here, and read what they changed.

        Raises:
            RemoteError: the place can't be used.
        """
        assert self._sync is not None
        self._sync.now()

    def close(self) -> None:
        """Tell the others what they don't know yet, if the place answers."""
        if self._sync is not None:
            self._sync.close()


def is_encrypted(url: object, *, timeout: float, options: Mapping[str, Any]) -> bool:
    """Whether the store in a place is encrypted. A place that is empty, or holds something else, isn't.

    Raises:
        RemoteError: it can't be asked. A folder that is made before it now would be readable, if the place turns out to be encrypted.
    """
    objects = open_objects(url, timeout=timeout, options=options)
    try:
        raw = objects.get("store.json", MOST_BYTES)
        return raw is not None and Description.read(raw).encrypted
    except ValueError:
        return False
    except RemoteRefusedError:
        raise
    except RemoteError as error:
        raise RemoteError(
            f"{error}. So it is not known whether the new folder before it has to be encrypted: try again when it answers, or give encrypt=True or False"
        ) from error
    finally:
        objects.close()
