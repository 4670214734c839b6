"""What a store is made of: its parts are made and connected here, and closed in reverse. Opening a store is making them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from .buffers import SlabPool
from .claims import Claims, FileClaims, MemoryClaims
from .directory import StoreDirectory
from .document_changes import DocumentChanges
from .documents import Documents
from .errors import StoreReadOnlyError
from .files import explain
from .index import Index, MemoryIndex
from .known_texts import KnownTexts
from .notes import Notes
from .overview import Overview
from .paths import is_store
from .placement import Placement
from .rawfile import DirectIO
from .removals import removals_of
from .repair import Repair
from .seals import CHECKSUMS, Seal
from .settings import StoreSettings
from .store_secrets import StoreSecrets
from .tenant_deletion import TenantDeletion
from .tiers import DeviceTier, DiskTier, HostTier, Pins, Tier
from .upkeep import Upkeep

if TYPE_CHECKING:
    from .remote.shared import Shared

__all__ = ["StoreParts"]

_log = logging.getLogger(__name__)


class StoreParts:
    """The parts of one open store.

    Args:
        settings: what the store is opened with.

    Attributes:
        settings: as given.
        memory: the pool that host memory for rows comes from.
        directory: the store's directory; None if there is none.
        index: the records of chunks and documents.
        removals: which documents were removed lately.
        documents, notes, claims: which chunks each document holds; the notes; which chunks are being computed.
        host: the tier in host memory.
        shared: what the store shares with other machines; None: nothing.
        placement: all tiers, and how chunks move between them.
        secrets: the store's key and its tenants' secrets.
        repair: mends the index, should it turn out to be damaged.
        changes, texts, overview, upkeep, deletion: what is done with these parts: documents are changed, texts read, all is counted, checked and
            pruned, tenants are deleted.

    Raises:
        StoreError: the store can't be opened; `ChunkStore` says for which reasons.
    """

    index: Index
    documents: Documents
    notes: Notes
    claims: Claims
    placement: Placement
    repair: Repair
    changes: DocumentChanges
    texts: KnownTexts
    overview: Overview
    upkeep: Upkeep
    deletion: TenantDeletion

    def __init__(self, settings: StoreSettings) -> None:
        self.settings = settings
        self.memory = SlabPool(pinned=settings.pinned, limit=settings.idle_bytes)
        self.removals = removals_of(settings.path)
        # An encrypted directory needs them before there is a placement. Nothing is in memory until then, so there is nothing to forget.
        self.secrets = StoreSecrets(settings.given_key, lambda tenant: self.placement.forget_tenant(tenant))
        self.directory: StoreDirectory | None = None
        self.shared: Shared | None = None
        self._pins = Pins()
        self.host = HostTier(settings.host_bytes, self._pins)
        if settings.path is None:
            self._make_in_memory()
            return
        try:
            self._make_on_disk(settings.path)
        except OSError as error:
            raise explain(error, settings.path) from error

    @property
    def seal(self) -> Seal:
        """What makes and checks the sums of files in the directory."""
        return CHECKSUMS if self.directory is None else self.directory.seal

    def close(self) -> None:
        """Release memory and files. Open readers keep working."""
        if self.shared is not None:
            self.shared.close()
        self.placement.close()
        self.memory.clear()
        if self.directory is not None:
            self.directory.close()
        else:
            self.index.close()

    def _make_in_memory(self) -> None:
        """A store without a directory."""
        self.index = MemoryIndex()
        self.documents = Documents(self.index, None, None, self.removals)
        self.notes = Notes(None, None)
        self.claims = MemoryClaims()
        self._connect([])
        self._open_shared()

    def _make_on_disk(self, path: Path) -> None:
        """A store with a directory."""
        settings, encrypt = self.settings, self.settings.encrypt
        if encrypt is None and settings.key is not None and settings.remote is not None and not is_store(path):
            from .remote.shared import is_encrypted

            encrypt = is_encrypted(
                settings.remote_url, timeout=settings.remote_timeout, options=settings.remote_options
            )
        directory = StoreDirectory(path, settings.key, self.secrets.keyring, encrypt=bool(encrypt))
        self.directory, self.index, temp = directory, directory.index, directory.temp
        self.documents = Documents(self.index, path / "documents", temp, self.removals, directory.seal)
        self.notes = Notes(path / "notes", temp, directory.seal)
        self.claims = FileClaims(path / "claims.lock") if directory.read_only is None else MemoryClaims()
        disk = DiskTier(
            path,
            budget=settings.disk_bytes,
            index=self.index,
            temp=temp,
            pins=self._pins,
            pool=self.memory,
            direct=DirectIO(settings.direct_io),
            seal=directory.seal,
        )
        self._connect([disk])
        directory.bring_in_line(disk, self.documents)
        self._open_shared()

    def _connect(self, on_disk: list[DiskTier]) -> None:
        """Put the tiers together, and make what works on them."""
        tiers: list[Tier] = [self.host, *on_disk]
        if self.settings.device is not None:
            tiers.insert(0, DeviceTier(self.settings.device_bytes, self._pins, self.settings.device))
        if self.settings.remote_url is not None:
            self.shared = shared = self._share(self.settings.remote_url)
            self.notes = shared.notes
            tiers.append(shared.tier)
        self.placement = Placement(tiers, self.index, self.claims)
        self.secrets.keep_in(self.directory, self.shared)
        self.repair = Repair(self.directory, self.placement, self.documents)
        self.changes = DocumentChanges(self.index, self.documents, self.placement, self.repair, self.shared)
        self.texts = KnownTexts(self.index, self.repair, self._seal_of_texts)
        self.overview = Overview(self.placement, self.documents, self.repair)
        self.upkeep = Upkeep(self.placement, self.repair, self.shared)
        self.deletion = TenantDeletion(
            self.index,
            self.documents,
            self.changes,
            self.notes,
            self.upkeep,
            self.secrets,
            self.removals,
            self.repair,
            self.shared,
        )

    def _share(self, url: str) -> Shared:
        """What reaches the shared place. It calls parts that are made after it, once it is open."""
        settings, directory = self.settings, self.directory
        if directory is not None and directory.read_only is not None:
            raise StoreReadOnlyError(
                f"the store {settings.path} can only be read here, so nothing of {settings.remote} could be kept in it: give the URL as the store's path"
            )
        # Imported here: without a remote tier nothing of it is loaded.
        from .remote.shared import Shared

        return Shared(
            url,
            timeout=settings.remote_timeout,
            options=settings.remote_options,
            codec=settings.remote_codec,
            index=self.index,
            documents=self.documents,
            notes=self.notes,
            pins=self._pins,
            pool=self.memory,
            behind=directory is not None,
            source=lambda key: self.placement.whole_here(key),
            forget=lambda keys: self.placement.forget(keys),
            key=settings.key,
            encrypted=(settings.encrypt or None) if directory is None else directory.encrypted,
            keyring=self.secrets.keyring,
            erased=lambda tenant, life: self.deletion.deleted_elsewhere(tenant, life),
        )

    def _open_shared(self) -> None:
        """Read what is in the shared place, and follow it from now on."""
        if self.shared is None:
            if self.directory is not None and self.repair.healed(lambda: self.index.get("catalogue")) is not None:
                _log.warning(
                    "the store %s shares what it has with other machines, and is opened without remote=: what is stored or removed now "
                    "is so on this machine alone",
                    self.settings.path,
                )
            return
        try:
            self.shared.open(self.repair.healed)
        except BaseException:
            self.placement.close()
            raise

    def _seal_of_texts(self) -> Seal:
        """What the texts in the index are written with: the directory's seal, or if there is none the shared place's."""
        if self.directory is not None or self.shared is None:
            return self.seal
        return self.shared.tier.catalogue.known_seal
