"""What a remote place holds, in this store's own index, and what this store has to tell the others.

The index has a record "remote/<digest>" of each chunk that is there, the record "catalogue" (the place's id and the last change of its log
that was read), and "outbox/<number>" records of what this store changed and the others don't know yet. An op waits in the outbox until it
is in the log, over restarts too if the index lasts. Processes that share an index share all of these.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..documents import Documents
from ..errors import StoreVersionError, UnknownDocumentError
from ..index import Index
from ..keys import FORMAT_VERSION, ChunkKey
from ..texts import TextRecord, note_text_record
from .changes import (
    Change,
    DamagedChangeError,
    Op,
    State,
    change_name,
    encode,
    latest_snapshot,
    read_change,
    write_snapshot,
    written_at,
)
from .objects import Objects, RemoteError

__all__ = ["Catalogue"]

SNAPSHOT_EVERY = 256
"""Changes between two snapshots."""
_OPS_A_CHANGE = 2000
_TRIES = 64
"""Other writers that may come first before a round ends without a change of this store."""
_MOST_STORE = 1 << 16
_BAD_READS = 3
"""Times that a change which can't be read is read again before it is passed over."""

_DAY = 86_400.0

_log = logging.getLogger(__name__)


class Catalogue:
    """Keeps a store's index in line with a remote place's log, and adds to that log. Safe to use from several threads.

    Args:
        objects: the remote place.
        index: the store's index.
        documents: the store's documents, which take over those of the log.
        forget: deletes chunks that are gone from what this machine has of them.
        upload: called with the key of a chunk that is to be written to the place. Returns the op "chunk" of it; None if it isn't here any more.
    """

    def __init__(
        self,
        objects: Objects,
        index: Index,
        documents: Documents,
        forget: Callable[[Sequence[ChunkKey]], int],
        upload: Callable[[ChunkKey], Op | None],
    ) -> None:
        self._objects, self._index, self._documents = objects, index, documents
        self._forget, self._upload = forget, upload
        self._round = threading.RLock()  # one thread at a time reads or writes the log
        self._bad_reads = 0
        self._joined = False

    # -- what is there --------------------------------------------------------------------------------------------

    def find(self, key: ChunkKey) -> dict[str, Any] | None:
        """The record of a chunk in the place: object, size, head (its bytes) and tokens; None if it isn't there."""
        record: dict[str, Any] | None = self._index.get(f"remote/{key}")
        return record

    def chunks(self) -> list[ChunkKey]:
        """All chunks that are in the place."""
        return [ChunkKey(name.removeprefix("remote/")) for name in self._index.names("remote/")]

    def totals(self) -> tuple[int, int]:
        """How many chunks are in the place, and their bytes."""
        state = self._state()
        return state["chunks"], state["bytes"]

    @property
    def waiting(self) -> int:
        """Ops that the others don't know yet."""
        return self._index.count("outbox/")

    # -- what this store changes ----------------------------------------------------------------------------------

    def add(self, op: Op) -> None:
        """Put an op into the outbox. Call it inside the index's transaction that makes the same change here."""
        # In the order of calls, over restarts and processes.
        with self._index.transaction():
            number = int(self._index.get("catalogue-outbox") or 0) + 1
            self._index.set("catalogue-outbox", number)
            self._index.set(f"outbox/{number:020d}", op)

    def written(self, op: Op) -> None:
        """A chunk was written to the place by this store: record it here, before the others know of it."""
        with self._index.transaction():
            if self.find(ChunkKey(op["key"])) is None:
                self._set_chunk(op)

    def removed(self, key: ChunkKey) -> int:
        """A chunk is to leave the place. Returns its bytes."""
        with self._index.transaction():
            again: Op | None = None
            for name, op in self._outbox():
                if op["op"] == "chunk" and op["key"] == key.digest:
                    again = op
                    self._index.delete(name)
            record = self.find(key)
            if record is None:
                return 0
            self._drop_chunk(key)
            # If a document turns out to hold it, the chunk stays: its record comes back, and the others are told of it if they weren't.
            self.add({"op": "free", "key": key.digest, "object": record["object"], "record": record, "again": again})
            return int(record["size"])

    # -- the log --------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing is read from the log or added to it while the context is open, by this process."""
        with self._round:
            yield

    def join(self) -> None:
        """Make sure that the place holds a store of this format, and make it one if it is empty.

        Raises:
            StoreVersionError: it holds something else.
            RemoteError: it can't be used.
        """
        if self._joined and self._state()["id"]:  # an index that was made anew knows of no place
            return
        described = {"format": "cachetune-store", "version": FORMAT_VERSION, "id": uuid.uuid4().hex}
        raw = self._objects.get("store.json", _MOST_STORE)
        if raw is None:
            self._objects.put("store.json", [json.dumps(described).encode()], create=True)
            raw = self._objects.get("store.json", _MOST_STORE)
        try:
            found = json.loads(raw or b"")
            version, identity = found["version"], str(found["id"])
            if found["format"] != "cachetune-store":
                raise ValueError
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise StoreVersionError(
                f"{self._objects.place}/store.json is not that of a store; give another prefix, or delete what is below this one"
            ) from error
        if version != FORMAT_VERSION:
            raise StoreVersionError(
                f"{self._objects.place} holds a store of format version {version!r}; this release reads version {FORMAT_VERSION}: "
                "give another prefix and precompute again"
            )
        with self._index.transaction():
            state = self._state()
            if state["id"] != identity:
                # Another place than before, or the first one: nothing that is known of chunks there is true of it.
                for name in list(self._index.names("remote/")):
                    self._index.delete(name)
                self._index.set("catalogue", state | {"id": identity, "position": 0, "chunks": 0, "bytes": 0})
        self._joined = True

    def catch_up(self, *, look_far: bool = False) -> int:
        """Read what the others have changed. Returns how many changes there were.

        Args:
            look_far: look for a snapshot first. It is newer than changes that were deleted.
        """
        read = 0
        with self._round:
            self.join()
            look_far = look_far or not self._state()["position"]
            while True:
                position = self._state()["position"]
                if look_far:
                    snapshot = latest_snapshot(self._objects, above=position)
                    if snapshot is not None:
                        self._take_over(snapshot)
                        position, read = snapshot.number, read + 1
                    look_far = False
                change = self._read(position + 1)
                if change is None:
                    return read
                self._apply(position, change)
                read += 1

    def publish(self) -> bool:
        """Tell the others what waits in the outbox. Returns whether nothing waits any more."""
        with self._round:
            self.join()
            full = self._upload_waiting()
            for _ in range(_TRIES):
                self.catch_up()
                with self._index.transaction():
                    position = self._state()["position"]
                    named = [(name, op) for name, op in self._outbox() if not self._needs_upload(op)][:_OPS_A_CHANGE]
                    named = [(name, op) for name, op in named if not self._is_held_again(name, op)]
                if not named:
                    if full is not None:
                        raise full
                    return self.waiting == 0
                change = Change(self._writer(), [name for name, _ in named], [_told(op) for _, op in named])
                if self._objects.put(change_name(position + 1), [encode(change)], create=True):
                    self._apply(position, change)
                    if (position + 1) % SNAPSHOT_EVERY == 0:
                        self._compact(position + 1)
        return False

    def sweep(self) -> int:
        """Delete chunks' objects that are in no change, because their writer died. Returns how many there were.

        Those written during the last day stay: their writer may be about to say so.
        """
        with self._round:
            self.catch_up(look_far=True)
            known = {(self.find(key) or {}).get("object") for key in self.chunks()}
            strays = [
                name
                for name in self._objects.names("chunks/")
                if name not in known and (written := written_at(name)) is not None and written < time.time() - _DAY
            ]
            self._objects.delete(strays)
            return len(strays)

    def _read(self, number: int) -> Change | None:
        try:
            found = read_change(self._objects, number)
        except DamagedChangeError as error:
            self._bad_reads += 1
            if self._bad_reads < _BAD_READS:
                raise RemoteError(str(error)) from error
            _log.error("%s: it is passed over. Index again the documents that it may have been about", error)
            found = Change("", [], [])
        self._bad_reads = 0
        return found

    def _compact(self, number: int) -> None:
        """Add up all changes in a snapshot."""
        before = latest_snapshot(self._objects) or State()
        for each in range(before.number + 1, number + 1):
            change = read_change(self._objects, each)
            if change is None:
                return  # another one has made a later snapshot, and deleted what came before it
            before.add(change.ops)
            before.number = each
        write_snapshot(self._objects, before, self._writer(), keep=SNAPSHOT_EVERY)

    # -- taking changes over --------------------------------------------------------------------------------------

    def _apply(self, position: int, change: Change) -> None:
        """Take over the change behind `position`."""
        unwanted: list[str] = []
        with self._index.transaction():
            if self._state()["position"] != position:
                return  # another process that shares the index was first
            if change.writer == self._writer():
                for name, op in zip(change.names, change.ops, strict=False):
                    unwanted += self._apply_own(name, op)
            else:
                for op in change.ops:
                    unwanted += self._apply_foreign(op)
            self._index.set("catalogue", self._state() | {"position": position + 1})
        # An object that stays because this fails is deleted by sweep().
        with contextlib.suppress(RemoteError):
            self._objects.delete(unwanted)

    def _apply_own(self, name: str, op: Op) -> list[str]:
        """Take over an op of this store, which is in the log now. Returns objects that nobody needs any more."""
        self._index.delete(name)
        if op["op"] == "free":
            return [op["object"]]
        return []

    def _apply_foreign(self, op: Op) -> list[str]:
        """Take over an op of another store. Returns objects of this one that nobody needs any more."""
        kind = op["op"]
        if kind == "chunk":
            return self._take_chunk(op)
        if kind == "free":
            key = ChunkKey(op["key"])
            record = self.find(key)
            if record is not None and record["object"] == op["object"]:
                self._drop_chunk(key)
                if not self._documents.holds(key):
                    self._forget([key])
            return []
        self._take_document(op)
        return []

    def _take_chunk(self, op: Op) -> list[str]:
        key, unwanted = ChunkKey(op["key"]), []
        record = self.find(key)
        if record is not None:
            ours = [name for name, each in self._outbox() if each["op"] == "chunk" and each["key"] == key.digest]
            if not ours or record["object"] == op["object"]:
                return []
            # Both have written it. The one that is first in the log stays.
            unwanted = [record["object"]]
            for name in ours:
                self._index.delete(name)
            self._drop_chunk(key)
        self._set_chunk(op)
        return unwanted

    def _take_document(self, op: Op) -> None:
        tenant, name = op["tenant"], op["id"]
        keys = [ChunkKey(digest) for digest in op["chunks"]] if "chunks" in op else []
        for waiting, each in self._outbox():
            if (each.get("tenant"), each.get("id")) == (tenant, name):
                if each["op"] != "add":
                    return  # what was done here comes later in the log, and holds
                if op["op"] != "add":
                    # It was removed or replaced before: its text must not come back.
                    self._index.delete(waiting)
        if op["op"] == "put":
            if self._documents.chunks_of(tenant, name) != keys:
                self._documents.put(tenant, name, keys, self._forget)
        elif op["op"] == "add":
            self._documents.extend(tenant, name, keys, self._forget)
        else:
            try:
                self._documents.delete(tenant, name, self._forget)
            except UnknownDocumentError:
                return

    def _take_over(self, state: State) -> None:
        """Make the index agree with a snapshot."""
        with self._index.transaction():
            if self._state()["position"] >= state.number:
                return
            ours = {each["key"] for _, each in self._outbox() if each["op"] == "chunk"}
            for key in self.chunks():
                op = state.chunks.get(key.digest)
                if key.digest not in ours and (op is None or op["object"] != (self.find(key) or {}).get("object")):
                    self._drop_chunk(key)
                    if op is None and not self._documents.holds(key):
                        self._forget([key])
            for op in state.chunks.values():
                self._take_chunk(op)
            joined = bool(self._state()["position"])
            for tenant, name in [place for place in self._documents.places() if place not in state.documents]:
                if joined:  # before it has joined, a store has documents of its own
                    self._take_document({"op": "del", "tenant": tenant, "id": name})
            for (tenant, name), chunks in state.documents.items():
                self._take_document({"op": "put", "tenant": tenant, "id": name, "chunks": chunks})
            self._index.set("catalogue", self._state() | {"position": state.number})

    # -- records --------------------------------------------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        found: dict[str, Any] | None = self._index.get("catalogue")
        return found or {"id": "", "position": 0, "chunks": 0, "bytes": 0, "writer": ""}

    def _writer(self) -> str:
        with self._index.transaction():
            state = self._state()
            if not state["writer"]:
                self._index.set("catalogue", state := state | {"writer": uuid.uuid4().hex})
            return str(state["writer"])

    def _outbox(self) -> list[tuple[str, Op]]:
        return list(self._index.items("outbox/"))

    def _set_chunk(self, op: Op) -> None:
        record = {name: op[name] for name in ("object", "size", "head", "tokens")}
        self._index.set(f"remote/{op['key']}", record)
        if op["text"] is not None:
            note_text_record(
                self._index,
                ChunkKey(op["key"]),
                TextRecord(text=op["text"], tokens=op["tokens"], namespace=op["namespace"]),
            )
        self._count(1, op["size"])

    def _drop_chunk(self, key: ChunkKey) -> None:
        record = self.find(key)
        if record is not None:
            self._index.delete(f"remote/{key}")
            self._count(-1, -record["size"])

    def _count(self, chunks: int, size: int) -> None:
        state = self._state()
        self._index.set("catalogue", state | {"chunks": state["chunks"] + chunks, "bytes": state["bytes"] + size})

    # -- the outbox -----------------------------------------------------------------------------------------------

    def _needs_upload(self, op: Op) -> bool:
        return op["op"] == "chunk" and "object" not in op

    def _upload_waiting(self) -> RemoteError | None:
        """Write the chunks that wait for it to the place. Returns why that ended early: what else waits can be told all the same."""
        for name, op in self._outbox():
            if not self._needs_upload(op):
                continue
            try:
                done = None if self.find(ChunkKey(op["key"])) else self._upload(ChunkKey(op["key"]))
            except RemoteError as error:
                return error
            with self._index.transaction():
                if self._index.get(name) is None:
                    # Removed meanwhile: its object goes again.
                    if done is not None:
                        self.add(
                            {"op": "free", "key": done["key"], "object": done["object"], "known": False, "record": None}
                        )
                elif done is None:
                    self._index.delete(name)
                else:
                    self._index.set(name, done)
                    self.written(done)
        return None

    def _is_held_again(self, name: str, op: Op) -> bool:
        """Whether a chunk that was to be removed is held by a document by now. It stays then."""
        if op["op"] != "free" or not op["record"] or not self._documents.holds(ChunkKey(op["key"])):
            return False
        if self.find(ChunkKey(op["key"])) is not None:
            return False  # another object has taken its place
        self._index.delete(name)
        self._index.set(f"remote/{op['key']}", op["record"])
        self._count(1, op["record"]["size"])
        if op["again"] is not None:
            self.add(op["again"])
        return True


def _told(op: Op) -> Op:
    """An op as the others need it."""
    return {name: value for name, value in op.items() if name not in ("record", "again")}
