"""Whether any document still holds a missed chunk by the time the chunk is stored.

Documents may be removed or replaced between a request and the storing of the chunks that it missed. So the store checks twice: in the
transaction that adds the chunk to its document, and once more when the chunk has been written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cachetune_rag.concurrency.deadline import Call
from cachetune_store import ChunkKey, ChunkStore, changes_so_far


@dataclass(eq=False)
class ChunkToStore:
    """A chunk that is to be stored.

    Attributes:
        ids, text: its token ids and its text; "" where the store alone may know the text.
        owners: the documents that it belongs to, each with the value that `changes_so_far` had when this became known. None stands for
            a request that named no document.
        recognised: set if a request found the chunk's text among the stored ones and then missed the chunk: the value that
            `changes_so_far` had then. The chunk belongs to every document that holds it, and isn't stored if none does any more.
    """

    ids: tuple[int, ...]
    text: str
    owners: dict[str | None, int] = field(default_factory=dict)
    recognised: int | None = None

    @property
    def wanted(self) -> bool:
        """Whether it has an owner, or may have one."""
        return bool(self.owners) or self.recognised is not None

    def join(self, other: ChunkToStore) -> None:
        """Add the owners of the same chunk, when another request missed it or a prompt shows it twice."""
        for owner, since in other.owners.items():
            self.owners[owner] = max(since, self.owners.get(owner, since))
        self.text = self.text or other.text
        if other.recognised is not None:
            self.recognised = max(other.recognised, self.recognised or 0)


class Owners:
    """Looks after the owners of chunks while these are computed and stored.

    Args:
        store: where the chunks and documents are.
        tenant: whose chunks they are.
        call: makes the calls that may touch the store's disk.
    """

    def __init__(self, store: ChunkStore, tenant: str, call: Call):
        self._store, self._tenant, self._call = store, tenant, call

    def may_want(self, chunk: ChunkToStore) -> bool:
        """Whether a chunk has an owner that wasn't removed or replaced by this process. Nothing is read from disk."""
        return self._any_left(chunk)

    def want(self, key: ChunkKey, chunk: ChunkToStore, keys_of: Callable[[Sequence[int]], Sequence[ChunkKey]]) -> bool:
        """Whether anybody wants a chunk, before it is computed.

        Args:
            key: the chunk's key.
            chunk: the chunk. If it was recognised, the documents that hold it become its owners.
            keys_of: says under which keys a chunk of these token ids may be recognised.
        """
        if chunk.recognised is not None and not self._call(self._store.holds, key):
            now, since, keys = changes_so_far(), chunk.recognised, keys_of(chunk.ids)
            found = self._call(self._store.holders, keys, tenant=self._tenant)
            for document in found:
                chunk.owners.setdefault(document, now)
            if not found and any(self._call(self._store.contains, each) for each in keys):
                chunk.owners.setdefault(None, since)  # stored by a request that named no document
        return self._any_left(chunk) or self._held(key, chunk)

    def take(self, key: ChunkKey, chunk: ChunkToStore) -> bool:
        """Add a chunk to its documents. Returns whether anybody still wants it."""
        taken = False
        for document, since in list(chunk.owners.items()):
            if document is None:
                taken |= not self._store.removed_since(since, tenant=self._tenant)
            else:
                taken |= self._call(self._store.extend_document, document, [key], tenant=self._tenant, since=since)
        return taken or self._held(key, chunk)

    def keep(self, key: ChunkKey, chunk: ChunkToStore) -> bool:
        """Once a chunk is written, delete it if it has lost its owners meanwhile. Returns whether it is kept."""
        nobodys = chunk.owners.get(None)
        if nobodys is not None and not self._store.removed_since(nobodys, tenant=self._tenant):
            return True
        return not self._call(self._store.free_unheld, key)

    def _any_left(self, chunk: ChunkToStore) -> bool:
        return any(
            not self._store.removed_since(since, document, tenant=self._tenant)
            for document, since in list(chunk.owners.items())
        )

    def _held(self, key: ChunkKey, chunk: ChunkToStore) -> bool:
        """Whether a document holds the chunk, and the chunk was recognised or named as a document's: then a document's new version has it."""
        named = chunk.recognised is not None or any(owner is not None for owner in list(chunk.owners))
        return named and self._call(self._store.holds, key)
