"""Changes of documents: what they free is deleted, and other machines are told of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from .documents import Documents
from .index import Index
from .keys import ChunkKey
from .placement import Placement
from .repair import Repair

if TYPE_CHECKING:
    from .remote.shared import Shared

__all__ = ["DocumentChanges"]

_Result = TypeVar("_Result")


class DocumentChanges:
    """Changes a store's documents.

    Args:
        index: the store's index.
        documents: which chunks each document holds.
        placement: the chunks, of which those that no document holds any more are deleted.
        repair: mends the index, should it turn out to be damaged.
        shared: what the store shares with other machines; None: nothing.
    """

    def __init__(
        self, index: Index, documents: Documents, placement: Placement, repair: Repair, shared: Shared | None
    ) -> None:
        self._index, self._documents, self._placement = index, documents, placement
        self._repair, self._shared = repair, shared

    def put(self, tenant: str, doc_id: str, keys: Sequence[ChunkKey]) -> None:
        """Put or replace a document."""
        self._change(lambda: self._documents.put(tenant, doc_id, keys, self._free), "put", tenant, doc_id, keys)

    def extend(self, tenant: str, doc_id: str, keys: Sequence[ChunkKey], since: int | None) -> bool:
        """Add chunks to a document. Returns whether it holds them now. See `Documents.extend`."""
        return self._change(
            lambda: self._documents.extend(tenant, doc_id, keys, self._free, since), "add", tenant, doc_id, keys
        )

    def delete(self, tenant: str, doc_id: str) -> int:
        """Delete a document. Returns the bytes that were freed.

        Raises:
            UnknownDocumentError: there is no such document.
        """
        if self._shared is not None and self._repair.healed(lambda: self._documents.chunks_of(tenant, doc_id)) is None:
            self._shared.now()  # others may have stored it just now
        return self._change(lambda: self._documents.delete(tenant, doc_id, self._free), "del", tenant, doc_id)

    def free_unheld(self, key: ChunkKey) -> bool:
        """Delete a chunk unless a document holds it. Returns whether it was deleted."""
        freed = self._repair.healed(lambda: self._documents.free_unheld(key, self._free))
        if self._shared is not None:
            self._shared.changed()
        return freed

    def _change(
        self, change: Callable[[], _Result], op: str, tenant: str, document: str, keys: Sequence[ChunkKey] | None = None
    ) -> _Result:
        """Change a document, and tell the others."""
        shared = self._shared
        if shared is None:
            return self._repair.healed(change)
        told: dict[str, Any] = {"op": op, "tenant": tenant, "id": document}
        if keys is not None:
            told["chunks"] = [key.digest for key in keys]

        def both() -> _Result:
            with self._index.transaction():
                result = change()
                if result is not False:  # what extend() says of a document that was removed
                    shared.add(told)
                return result

        result = self._repair.healed(both)
        shared.changed()
        return result

    def _free(self, keys: Sequence[ChunkKey]) -> int:
        return sum(self._placement.remove(key) for key in keys)
