"""Deleting all that belongs to a tenant: its secrets, documents, notes and chunks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .document_changes import DocumentChanges
from .documents import Documents
from .index import Index
from .notes import Notes
from .removals import Removals
from .repair import Repair
from .store_secrets import StoreSecrets
from .upkeep import Upkeep

if TYPE_CHECKING:
    from .remote.shared import Shared

__all__ = ["TenantDeletion"]


class TenantDeletion:
    """Deletes tenants, and takes over that other machines have deleted one.

    Args:
        index: the store's index.
        documents, changes: the store's documents, and what changes them.
        notes: its notes.
        upkeep: prunes its chunks.
        secrets: the secrets of its tenants, if it is encrypted.
        removals: is told of deleted tenants, so that no request brings back what it read before.
        repair: mends the index, should it turn out to be damaged.
        shared: what the store shares with other machines; None: nothing.
    """

    def __init__(
        self,
        index: Index,
        documents: Documents,
        changes: DocumentChanges,
        notes: Notes,
        upkeep: Upkeep,
        secrets: StoreSecrets,
        removals: Removals,
        repair: Repair,
        shared: Shared | None,
    ) -> None:
        self._index, self._documents, self._changes, self._notes = index, documents, changes, notes
        self._upkeep, self._secrets, self._removals = upkeep, secrets, removals
        self._repair, self._shared = repair, shared

    def delete(self, tenant: str) -> int:
        """Delete all that belongs to a tenant. Returns the bytes that were freed.

        Its secrets go first: from then on nobody can read what is left, whatever happens meanwhile.

        Raises:
            StorePathError: the remote tier can't be used now, so something of the tenant may be left.
        """
        self._removals.note(tenant, None)
        if self._shared is not None:
            self._shared.now()  # what others have stored just now goes, too
        self._erase(tenant)
        ids = sorted(doc_id for doc_id, _ in self._repair.healed(lambda: list(self._documents.of(tenant))))
        freed = sum(self._changes.delete(tenant, doc_id) for doc_id in ids)
        self._repair.healed(lambda: self._notes.delete_all(tenant))
        return freed + self._upkeep.prune(lambda head: head.namespace.tenant != tenant).bytes

    def deleted_elsewhere(self, tenant: str, life: str) -> None:
        """Another machine has deleted a tenant. Called in the index's transaction that takes this over.

        Args:
            tenant: the tenant.
            life: its secrets up to this life are erased (see `TenantSecrets.life`); "" if it has none.
        """
        self._removals.note(tenant, None)
        if life:
            self._secrets.keyring().erased_elsewhere(tenant, life)
        self._notes.forget(tenant)

    def _erase(self, tenant: str) -> None:
        """Tell the others that a tenant is deleted, and erase its secrets, if it has any."""
        secrets = self._secrets.of_tenants
        # The others are told first: if this process dies in between, they erase the secrets all the same.
        life = "" if secrets is None else self._repair.healed(lambda: secrets.life(tenant))
        if self._repair.healed(lambda: self._index.get("catalogue")) is not None:
            # Also where a store that has a shared place was opened without it: what is told waits until the store is opened with it again.
            from .remote.book import Book

            with self._index.transaction():
                Book(self._index).tell({"op": "erase", "tenant": tenant, "secret": life})
        if secrets is not None:
            self._repair.healed(lambda: secrets.erase(tenant))
        if self._shared is not None:
            self._shared.changed()
