"""What a remote place holds, in this store's own index, and what this store has to tell the others.

The index has a record "remote/<digest>" of each chunk that is there, the record "catalogue" (the place's id and the last change of its log
that was read), "outbox/<number>-<id>" records of what this store changed and the others don't know yet, and "waiting/<digest>" of each chunk
among these. An op waits in the outbox until it is in the log, over restarts too if the index lasts. Processes that share an index share all of these.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..documents import Documents
from ..errors import RemoteError
from ..index import Index
from ..keys import ChunkKey
from ..seals import Seal
from ..storekey import StoreKey
from .book import Book
from .changes import (
    MOST_BYTES,
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
from .described_place import DescribedPlace
from .objects import Objects
from .outbox import Uploads, tellable
from .taking import Taking, as_told

__all__ = ["Catalogue"]

SNAPSHOT_EVERY = 256
"""Changes between two snapshots."""
_OPS_A_CHANGE = 2000
_TRIES = 64
"""Other writers that may come first before a round ends without a change of this store."""
_BAD_READS = 3
"""Times that a change which can't be read is read again before it is passed over."""

_DAY = 86_400.0

_log = logging.getLogger(__name__)


class Catalogue:
    """Keeps a store's index in line with a remote place's log, and adds to that log. Safe to use from several threads.

    Args:
        objects: the remote place.
        place: what it says of itself, and what protects it.
        index: the store's index.
        documents: the store's documents, which take over those of the log.
        forget: deletes chunks that are gone from what this machine has of them.
        upload: called with the key of a chunk that is to be written to the place. Returns the op "chunk" of it; None if it isn't here any more.
        erased: called with a tenant that another machine has deleted, and the life of which the secrets are erased; "" where it has none.
    """

    def __init__(
        self,
        objects: Objects,
        place: DescribedPlace,
        index: Index,
        documents: Documents,
        forget: Callable[[Sequence[ChunkKey]], int],
        upload: Callable[[ChunkKey], Op | None],
        erased: Callable[[str, str], None] = lambda tenant, secret: None,
    ) -> None:
        self._objects, self._place, self._index, self._documents = objects, place, index, documents
        self._book = Book(index)
        self._uploads = Uploads(objects, index, self._book, upload)
        self._forget, self._erased = forget, erased
        self._round = threading.RLock()  # one thread at a time reads or writes the log
        self._bad_reads = 0
        self._joined = False

    # -- what is there --------------------------------------------------------------------------------------------

    def find(self, key: ChunkKey) -> dict[str, Any] | None:
        """See Book.find."""
        return self._book.find(key)

    def chunks(self) -> list[ChunkKey]:
        """All chunks that are in the place."""
        return self._book.chunks()

    def totals(self) -> tuple[int, int]:
        """How many chunks are in the place, and their bytes."""
        state = self._book.state()
        return state["chunks"], state["bytes"]

    @property
    def waiting(self) -> int:
        """Ops that the others don't know yet."""
        return self._index.count("outbox/")

    def seal(self) -> Seal:
        """What the sums of objects in the place are made and checked with. Where there is a key, the place says how: it is asked once.

        Raises:
            RemoteError: it can't be used.
            StoreKeyError: it was made with another key, or without one.
        """
        if not self._place.seal_is_known:
            with self._round:
                self.join()
        return self._place.seal

    @property
    def known_seal(self) -> Seal:
        """The place's seal, without asking the place: checksums until it has answered once."""
        return self._place.seal

    def is_waiting(self, key: ChunkKey) -> bool:
        """Whether the others are to be told already that a chunk is in the place, or will be."""
        return bool(self._book.waiting(key))

    # -- what this store changes ----------------------------------------------------------------------------------

    def add(self, op: Op) -> None:
        """Put an op into the outbox. Call it inside the index's transaction that makes the same change here."""
        with self._index.transaction():
            self._book.tell(op)

    def written(self, op: Op) -> None:
        """See Book.written."""
        self._book.written(op)

    def removed(self, key: ChunkKey, *, unusable: bool = False) -> int:
        """A chunk is to leave the place; also one that a document holds, if its object is `unusable`. Returns its bytes."""
        with self._index.transaction():
            again: Op | None = None
            for name in self._book.waiting(key):
                again = self._index.get(name)
                self._book.told(name)
            record = self._book.find(key)
            if record is None:
                return 0
            self._book.drop_chunk(key)
            told: Op = {"op": "free", "key": key.digest, "object": record["object"]}
            if not unusable:
                # If a document turns out to hold it, the chunk stays: its record comes back, and the others are told of it if they weren't.
                told |= {"record": record, "again": again}
            self._book.tell(told)
            return int(record["size"])

    # -- the log --------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing is read from the log or added to it while the context is open, and no chunk is written, by this process."""
        with self._uploads.paused(), self._round:
            yield

    def join(self) -> None:
        """Make sure that the place holds a store of this format, and make it one if it is empty.

        Raises:
            StoreVersionError: it holds something else.
            StoreKeyError: it was made with another key, or without one.
            RemoteError: it can't be used.
        """
        if self._joined and self._book.state()["id"]:  # an index that was made anew knows of no place
            return
        identity = self._place.enter()
        with self._index.transaction():
            state = self._book.state()
            if state["id"] != identity:
                # Another place than before, or the first one: nothing that is known of chunks there is true of it.
                for key in self._book.chunks():
                    self._index.delete(f"remote/{key}")
                self._book.set_state(id=identity, position=0, chunks=0, bytes=0)
        self._joined = True

    def change_key(self, new: StoreKey) -> None:
        """Protect the place's root key with another key from now on.

        Raises:
            StoreKeyError: the place has no key, or another one than this store by now.
            RemoteError: it can't be used.
        """
        with self._round:
            self._place.change_key(new)

    def catch_up(self, *, look_far: bool = False) -> int:
        """Read what the others have changed. Returns how many changes there were.

        Args:
            look_far: look first whether it is still the same place, and for a snapshot. It is newer than changes that were deleted.
        """
        read = 0
        with self._round:
            self._joined = self._joined and not look_far
            self.join()
            look_far = look_far or not self._book.state()["position"]
            while True:
                position = self._book.state()["position"]
                if look_far:
                    snapshot = latest_snapshot(self._objects, self._place.seal, above=position)
                    if snapshot is not None:
                        with self._taking(position, snapshot.number) as taking:
                            if taking is not None:
                                taking.state(snapshot)
                        position, read = self._book.state()["position"], read + 1
                    look_far = False
                change = self._read(position + 1)
                if change is None:
                    return read
                self._apply(position, change)
                read += 1

    def publish(self) -> bool:
        """Tell the others what waits in the outbox, and write the chunks that wait for it. Returns whether nothing waits any more.

        What needs no chunk to be written is told first, and between chunks: a removal doesn't wait for uploads, and nor does another thread.
        """
        while True:
            self._tell()
            ended, full = self._uploads.write_waiting()
            if ended:
                return self._tell(all_of_it=full is not None, full=full)

    def _tell(self, *, all_of_it: bool = False, full: RemoteError | None = None) -> bool:
        """Tell the others what can be told now. Returns whether nothing waits any more.

        Args:
            all_of_it: documents of which chunks still wait to be written are told as well.
            full: why chunks can't be written; raised once the others know the rest.
        """
        with self._round:
            self.join()
            for _ in range(_TRIES):
                self.catch_up(look_far=self.waiting > 0 and self._is_cut_off())
                with self._index.transaction():
                    position = self._book.state()["position"]
                    named = tellable(self._book.outbox(), all_of_it=all_of_it)[:_OPS_A_CHANGE]
                    named = [(name, op) for name, op in named if not self._is_held_again(name, op)]
                if not named:
                    if full is not None:
                        raise full
                    return self.waiting == 0
                change = Change(self._book.writer(), [name for name, _ in named], [as_told(op) for _, op in named])
                name = change_name(position + 1)
                if self._objects.put(name, [encode(change, name, self._place.seal)], create=True):
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
            known = {(self.find(key) or {}).get("object") for key in self._book.chunks()}
            strays = [
                name
                for name in self._objects.names("chunks/")
                if name not in known and (written := written_at(name)) is not None and written < time.time() - _DAY
            ]
            self._objects.delete(strays)
            return len(strays)

    def _is_cut_off(self) -> bool:
        """Whether the last change that was read is gone: others have deleted it with those behind it, or the place was emptied.

        A change that is added then would stand before the others' next one, where nobody reads it any more. The last change is always there
        for a machine that is up to date, because snapshots leave the newest ones.
        """
        position = self._book.state()["position"]
        return position > 0 and self._objects.get(change_name(position), MOST_BYTES) is None

    def _read(self, number: int) -> Change | None:
        """A change of the log; None if there is none of that number. One that is damaged says nothing.

        Raises:
            RemoteError: it may be damaged, or was read badly: read it again.
        """
        try:
            found = read_change(self._objects, number, self._place.seal)
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
        before = latest_snapshot(self._objects, self._place.seal) or State()
        for each in range(before.number + 1, number + 1):
            change = read_change(self._objects, each, self._place.seal)
            if change is None:
                return  # another one has made a later snapshot, and deleted what came before it
            before.add(change.ops)
            before.number = each
        write_snapshot(self._objects, before, self._book.writer(), keep=SNAPSHOT_EVERY, seal=self._place.seal)

    def _apply(self, position: int, change: Change) -> None:
        """Take over the change behind `position`."""
        with self._taking(position, position + 1) as taking:
            if taking is None:
                return
            for number, op in enumerate(change.ops):
                # Whoever wrote it: names are drawn, and an index that was made anew has another writer's name and what waited in the old one.
                if number >= len(change.names) or not taking.own(change.names[number], op):
                    taking.foreign(op)

    @contextlib.contextmanager
    def _taking(self, position: int, then: int) -> Iterator[Taking | None]:
        """What takes changes over that lead from one position of the log to another; None if another process was first."""
        unwanted: list[str] = []
        with self._index.transaction():
            if self._book.state()["position"] != position:
                yield None
                return
            self._book.begin()
            try:
                taking = Taking(self._book, self._documents, self._forget, self._erased)
                yield taking
                unwanted = taking.unwanted
            finally:
                self._book.end()
            self._book.set_state(position=then)
        # An object that stays because this fails is deleted by sweep().
        with contextlib.suppress(RemoteError):
            self._objects.delete(unwanted)

    def _is_held_again(self, name: str, op: Op) -> bool:
        """Whether a chunk that was to be removed is held by a document by now. It stays then."""
        key = ChunkKey(op["key"]) if op["op"] == "free" and "record" in op else None
        if key is None or not self._documents.holds(key) or self.find(key) is not None:
            return False  # or another object has taken its place
        self._book.told(name)
        self._book.restore(key, op["record"])
        if op["again"] is not None:
            self._book.tell(op["again"])
        return True
