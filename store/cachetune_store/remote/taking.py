"""Taking over what other machines changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..documents import Documents
from ..errors import UnknownDocumentError
from ..keys import ChunkKey
from .book import Book
from .changes import Op, State

__all__ = ["Taking", "as_told"]


def as_told(op: Op) -> Op:
    """An op of the outbox as the others need it."""
    return {name: value for name, value in op.items() if name not in ("record", "again")}


class Taking:
    """Takes ops over into the index, inside one transaction.

    What this store changed and the others don't know yet comes later in the log than all that is taken over here, and holds against it.

    Args:
        book: the store's records of the place.
        documents: the store's documents.
        forget: deletes chunks from what this machine has of them.
        erased: called with a tenant that another machine has deleted, and the life of which the secrets are erased; "" where it has none.

    Attributes:
        unwanted: objects that this store has written and nobody needs any more.
    """

    def __init__(
        self,
        book: Book,
        documents: Documents,
        forget: Callable[[Sequence[ChunkKey]], int],
        erased: Callable[[str, str], None],
    ) -> None:
        self._book, self._documents, self._forget, self._erased = book, documents, forget, erased
        self.unwanted: list[str] = []
        self._own_chunks: dict[str, list[str]] = {}
        self._own_freed: set[str] = set()
        self._own_documents: dict[tuple[str, str], list[tuple[str, Op]]] = {}
        self._waiting = dict(book.outbox())
        for name, op in self._waiting.items():
            if op["op"] == "chunk":
                self._own_chunks.setdefault(op["key"], []).append(name)
            elif op["op"] == "free":
                self._own_freed.add(op["object"])
            elif "id" in op:
                self._own_documents.setdefault((op["tenant"], op["id"]), []).append((name, op))

    def own(self, name: str, op: Op) -> bool:
        """An op that its writer knows by `name` is in the log now. Returns whether it is one that waits here.

        In a copy of this store's folder, what waited when the copy was made has the same names. Whichever is first tells it for both.
        """
        if (waiting := self._waiting.get(name)) is None or as_told(waiting) != op:
            return False
        self._book.told(name)
        if op["op"] == "free":
            self.unwanted.append(op["object"])
        elif "id" in op:
            place = op["tenant"], op["id"]
            left = [each for each in self._own_documents[place] if each[0] != name]
            self._own_documents[place] = left
            if op["op"] != "del" and not left:  # the place doesn't know what waits
                self._documents.mark_shared(*place)
        return True

    def foreign(self, op: Op) -> None:
        """An op of another store."""
        kind = op["op"]
        if kind == "chunk":
            self._chunk(op)
        elif kind == "free":
            record = self._book.find(key := ChunkKey(op["key"]))
            if record is not None and record["object"] == op["object"]:
                self._book.drop_chunk(key)
                if not self._documents.holds(key):
                    self._forget([key])
        elif kind == "erase":
            self._erased(op["tenant"], op["secret"])
        else:
            self._document(op)

    def state(self, state: State) -> None:
        """All that a snapshot says, in place of what was known of the place."""
        for key in self._book.chunks():
            op = state.chunks.get(key.digest)
            record = self._book.find(key) or {}
            if key.digest not in self._own_chunks and (op is None or op["object"] != record.get("object")):
                self._book.drop_chunk(key)
                if op is None and not self._documents.holds(key):
                    self._forget([key])
        for op in state.erased.values():
            self._erased(op["tenant"], op["secret"])
        for op in state.chunks.values():
            self._chunk(op)
        for tenant, name in self._documents.shared():
            if (tenant, name) not in state.documents:
                self._document({"op": "del", "tenant": tenant, "id": name})
        for (tenant, name), chunks in state.documents.items():
            self._document({"op": "put", "tenant": tenant, "id": name, "chunks": chunks})

    def _chunk(self, op: Op) -> None:
        if op["object"] in self._own_freed:
            return  # a snapshot says what held before this store removed it
        key = ChunkKey(op["key"])
        record = self._book.find(key)
        if record is not None:
            if key.digest not in self._own_chunks or record["object"] == op["object"]:
                return
            # Both have written it. The one that is first in the log stays.
            self.unwanted.append(record["object"])
            self._book.drop_chunk(key)
        for name in self._own_chunks.pop(key.digest, ()):
            self._book.told(name)
        self._book.add_chunk(op)

    def _document(self, op: Op) -> None:
        tenant, name = place = op["tenant"], op["id"]
        for waiting, own in list(self._own_documents.get(place, ())):
            if own["op"] != "add":
                return
            if op["op"] != "add":
                # It was removed or replaced before: a text that is added must not come back.
                self._book.told(waiting)
                self._own_documents[place].remove((waiting, own))
        keys = [ChunkKey(digest) for digest in op.get("chunks", ())]
        if op["op"] == "put":
            if self._documents.chunks_of(tenant, name) != keys:
                self._documents.put(tenant, name, keys, self._forget, shared=True)
            else:
                self._documents.mark_shared(tenant, name)
        elif op["op"] == "add":
            self._documents.extend(tenant, name, keys, self._forget, shared=True)
        else:
            try:
                self._documents.delete(tenant, name, self._forget)
            except UnknownDocumentError:
                return
