"""A store's records of a shared place: which chunks are there, how far its log was read, and what the others are to be told."""

from __future__ import annotations

import uuid
from typing import Any

from ..index import Index
from ..keys import ChunkKey
from ..texts import TextRecord, note_text_records
from .changes import Op

__all__ = ["Book"]


class Book:
    """Records in an index. Call what changes them inside a transaction.

    Between `begin` and `end`, counts and texts are collected, so that taking over many chunks writes little more than their records.

    Args:
        index: the store's index.
    """

    def __init__(self, index: Index) -> None:
        self._index = index
        self._batch: tuple[list[int], dict[ChunkKey, TextRecord]] | None = None

    def find(self, key: ChunkKey) -> dict[str, Any] | None:
        """The record of a chunk in the place: object, size, head (its bytes) and tokens; None if it isn't there."""
        record: dict[str, Any] | None = self._index.get(f"remote/{key}")
        return record

    def chunks(self) -> list[ChunkKey]:
        """All chunks that are in the place."""
        return [ChunkKey(name.removeprefix("remote/")) for name in self._index.names("remote/")]

    def state(self) -> dict[str, Any]:
        """The place's id, the last change of its log that was read, chunks and bytes there, and the name of this store in its log."""
        found: dict[str, Any] | None = self._index.get("catalogue")
        return found or {"id": "", "position": 0, "chunks": 0, "bytes": 0, "writer": ""}

    def set_state(self, **changes: Any) -> None:
        """Change fields of the state."""
        self._index.set("catalogue", self.state() | changes)

    def writer(self) -> str:
        """The name of this store in the log. Processes that share an index have the same."""
        with self._index.transaction():
            if not self.state()["writer"]:
                self.set_state(writer=uuid.uuid4().hex)
            return str(self.state()["writer"])

    def begin(self) -> None:
        """Many chunks are going to be added or dropped, in this transaction."""
        self._batch = [0, 0], {}

    def end(self) -> None:
        """Write down what was collected since `begin`."""
        if self._batch is not None:
            (chunks, size), texts = self._batch
            self._batch = None
            self._count(chunks, size)
            note_text_records(self._index, texts)

    def add_chunk(self, op: Op) -> None:
        """A chunk is in the place."""
        key = ChunkKey(op["key"])
        self.restore(key, {name: op[name] for name in ("object", "size", "head", "tokens")})
        if op["text"] is not None:
            record = TextRecord(text=op["text"], tokens=op["tokens"], namespace=op["namespace"])
            if self._batch is not None:
                self._batch[1][key] = record
            else:
                note_text_records(self._index, {key: record})

    def written(self, op: Op) -> None:
        """A chunk was written to the place by this store: it is there, before the others know of it."""
        with self._index.transaction():
            if self.find(ChunkKey(op["key"])) is None:
                self.add_chunk(op)

    def restore(self, key: ChunkKey, record: dict[str, Any]) -> None:
        """A chunk is in the place as this record says."""
        self._index.set(f"remote/{key}", record)
        self._count(1, record["size"])

    def drop_chunk(self, key: ChunkKey) -> None:
        """A chunk isn't in the place any more."""
        record = self.find(key)
        if record is not None:
            self._index.delete(f"remote/{key}")
            self._count(-1, -record["size"])
            if self._batch is not None:
                self._batch[1].pop(key, None)

    def outbox(self) -> list[tuple[str, Op]]:
        """What the others are to be told, by name, in order."""
        return list(self._index.items("outbox/"))

    def tell(self, op: Op) -> None:
        """The others are to be told of an op, after those that wait already."""
        number = int(self._index.get("catalogue-outbox") or 0) + 1
        self._index.set("catalogue-outbox", number)
        # A copy of this folder counts on from the same number. Its changes are not this store's.
        name = f"outbox/{number:020d}-{uuid.uuid4().hex}"
        self._index.set(name, op)
        if op["op"] == "chunk":
            self._index.set(f"waiting/{op['key']}", [*self.waiting(ChunkKey(op["key"])), name])

    def told(self, name: str) -> None:
        """What waits under this name needs not be told any more."""
        op = self._index.get(name)
        self._index.delete(name)
        if op is not None and op["op"] == "chunk":
            left = [each for each in self.waiting(ChunkKey(op["key"])) if each != name]
            if left:
                self._index.set(f"waiting/{op['key']}", left)
            else:
                self._index.delete(f"waiting/{op['key']}")

    def waiting(self, key: ChunkKey) -> list[str]:
        """Names of the ops in the outbox that say that a chunk was written or is to be, without a look at all that waits."""
        return list(self._index.get(f"waiting/{key}") or ())

    def _count(self, chunks: int, size: int) -> None:
        if self._batch is not None:
            self._batch[0][0] += chunks
            self._batch[0][1] += size
            return
        state = self.state()
        self.set_state(chunks=state["chunks"] + chunks, bytes=state["bytes"] + size)
