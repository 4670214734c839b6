"""Chunks that requests missed: stored behind their answers, on a thread that gives way to requests."""

from __future__ import annotations

import _thread
import logging
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING

from cachetune_rag.chunks.owners import ChunkToStore
from cachetune_rag.concurrency.deadline import Call
from cachetune_rag.concurrency.idle import IdleQueue
from cachetune_rag.concurrency.model_lock import ModelLock
from cachetune_rag.text.prompts.prompt import Prompt
from cachetune_store import ChunkKey, StoreError

if TYPE_CHECKING:
    from cachetune_rag.chunks.chunk_computer import ChunkComputer

WAITING = 128
"""Chunks that may wait to be stored. The others are left to the next request that misses them."""
PATIENCE = 2.0
"""Seconds that chunks wait for an idle model. On a server that is never idle, they would otherwise be missed again and again."""
SPACING = 0.01
"""Seconds that are left to requests between two forwards of chunks whose patience has ended."""

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class _MissedTogether:
    """Chunks that one request missed.

    Attributes:
        chunks: those that are still to be stored.
        since: when the request missed them (`time.monotonic`).
    """

    chunks: list[ChunkToStore]
    since: float


class _Dropped(Exception):
    """What waits is not to be stored any more."""


class Backfill:
    """Stores the chunks that requests had to compute, so that later requests find them.

    A chunk is stored as precompute stores it, behind several lead-ins. That takes several times as long as the request took to
    compute it, so an answer doesn't wait for it. A chunk is computed when no request wants the model, one forward at a time, so
    that a request which comes meanwhile waits for one forward at most. After `PATIENCE` seconds, its forwards take turns with requests.
    A request for a chunk that waits computes it itself, exactly, like any chunk that is missing.

    A chunk of a document is stored under that document, so that it is deleted with it. If the document was removed, or replaced by a
    version without this chunk, after the request was built, the chunk isn't stored at all.

    Args:
        computer: computes and stores chunks.
        call: makes the calls that may touch the store's disk.
        lock: the model's.

    Attributes:
        queue: what waits to be stored.
    """

    def __init__(self, computer: ChunkComputer, call: Call, lock: ModelLock):
        self._computer, self._call, self._model = computer, call, lock
        self.queue: IdleQueue[_MissedTogether] = IdleQueue("cachetune-missed", lock, self._attempt, self._count_dropped)
        # Guarded by the queue's mutex:
        self._known: dict[tuple[int, ...], ChunkToStore] = {}  # all chunks in the queue, by their token ids
        self._unstored = self._withdrawn = 0
        self._late: SimpleQueue[tuple[Prompt, Sequence[int]]] = SimpleQueue()
        self._offering = threading.RLock()  # held while something of that is offered
        self._storing = threading.RLock()  # held while chunks are stored at once

    @property
    def withdrawn(self) -> int:
        """Chunks that were not stored because their document was removed or replaced meanwhile, so far."""
        self._offer_late()
        return self._withdrawn

    @property
    def waiting(self) -> int:
        """Chunks that are still to be stored."""
        self._offer_late()
        return len(self._known)

    @property
    def unstored(self) -> int:
        """Chunks that could not be stored, so far."""
        self._offer_late()
        return self._unstored

    def store(self, prompt: Prompt, missed: Sequence[int]) -> int:
        """Store chunks of a prompt now. Returns how many could not be stored.

        Args:
            prompt: the prompt.
            missed: which of its chunks, each at most once.
        """
        chunks = _chunks(prompt, missed)
        if not self._known.keys().isdisjoint(chunk.ids for chunk in chunks):
            self.wait()  # the thread may be storing them
        kept: list[ChunkKey] = []
        withdrawn: list[ChunkKey] = []
        try:
            if chunks:
                with self._storing:
                    self._computer.store_chunks(chunks, call=self._call, kept=kept.append, withdrawn=withdrawn.append)
        except StoreError as error:
            _tell(len(chunks) - len(kept) - len(withdrawn), error)
        with self.queue.mutex:
            self._unstored += len(chunks) - len(kept) - len(withdrawn)
            self._withdrawn += len(withdrawn)
        return len(chunks) - len(kept)

    def offer(self, prompt: Prompt, missed: Sequence[int]) -> int:
        """Store chunks of a prompt once there is time. Returns at once, and says how many will be stored. Arguments as for `store`."""
        if not self.queue.here:
            return 0
        chunks = _chunks(prompt, missed)
        with self.queue.mutex:
            new = []
            for chunk in chunks:
                if (known := self._known.get(chunk.ids)) is None:
                    new.append(chunk)
                else:
                    known.join(chunk)
            room = 0 if self.queue.closed else max(0, WAITING - len(self._known))
            taken, refused = new[:room], len(new[room:])
            self._unstored += refused
            if taken:
                self._known.update((chunk.ids, chunk) for chunk in taken)
                self.queue.put(_MissedTogether(taken, time.monotonic()))
            else:
                self.queue.start()
        return len(chunks) - refused

    def offer_from_anywhere(self, prompt: Prompt, missed: Sequence[int]) -> None:
        """As `offer`, for a caller that may hold any lock (garbage collection): it waits for none."""
        if not missed or not self.queue.here:
            return
        self._late.put((prompt, missed))
        with suppress(RuntimeError):  # the interpreter is going away
            _thread.start_new_thread(self._offer_late, ())

    def forget(self, document: str) -> None:
        """Drop what waits and belongs to this document alone. When this returns, nothing of it is being stored either."""
        self._offer_late()
        with self.queue.mutex:
            waiting = self.queue.items()
            for group in waiting:
                for chunk in list(group.chunks):
                    if document not in chunk.owners:
                        continue
                    del chunk.owners[document]
                    if (
                        not chunk.wanted and group is not waiting[0]
                    ):  # the first group is being stored, which looks at the owners
                        group.chunks.remove(chunk)
                        self._known.pop(chunk.ids, None)
                        self._withdrawn += 1
        with self._storing:  # wait for the chunk that is being stored right now
            pass
        if waiting:
            with self.queue.in_a_hurry():
                self.queue.wait_for(waiting[0])

    def wait(self, timeout: float | None = None) -> bool:
        """Store what waits without waiting for the model to be idle. Returns False if that took longer than `timeout` seconds."""
        self._offer_late()
        with self.queue.in_a_hurry():
            return self.queue.wait(timeout)

    def close(self) -> None:
        """Store what waits, and take no more. If an exception such as Ctrl-C interrupts this, what still waits is dropped."""
        self._offer_late()
        self.queue.close()
        try:
            self.wait()
        except BaseException:
            self.queue.drop()
            raise

    def _offer_late(self) -> None:
        """Offer what `offer_from_anywhere` took in."""
        if not self.queue.here:
            return
        with self._offering:
            while True:
                try:
                    late = self._late.get_nowait()
                except Empty:
                    return
                self.offer(*late)

    # -- the queue's thread ---------------------------------------------------------------------------------------

    def _attempt(self, group: _MissedTogether) -> None:
        """Store a group of chunks. Whatever goes wrong, no request is told of it."""
        chunks = list(group.chunks)
        owners = [set(chunk.owners) for chunk in chunks]
        kept: list[ChunkKey] = []
        withdrawn: list[ChunkKey] = []
        try:
            turn = _Turn(self.queue, self._model, group.since + PATIENCE)
            turn.wait_idle()
            self._computer.store_chunks(
                chunks, call=self._call, kept=kept.append, withdrawn=withdrawn.append, turn=turn
            )
        except _Dropped:
            pass
        except Exception as error:
            if not self.queue.dropped:
                _tell(len(chunks) - len(kept) - len(withdrawn), error)
        with self.queue.mutex:
            self._unstored += max(0, len(chunks) - len(kept) - len(withdrawn))
            self._withdrawn += len(withdrawn)
            # Another request missed these meanwhile, as another document's: they are added to that document in a second round.
            again = [chunk for chunk, before in zip(chunks, owners, strict=True) if chunk.owners.keys() - before]
            group.chunks = again if not self.queue.dropped else []
            for chunk in chunks:
                if chunk not in group.chunks:
                    self._known.pop(chunk.ids, None)
            if not group.chunks:
                self.queue.done(group)

    def _count_dropped(self, group: _MissedTogether) -> None:
        self._unstored += len(group.chunks)
        for chunk in group.chunks:
            self._known.pop(chunk.ids, None)


class _Turn:
    """The model's lock, taken when no request wants the model; from `deadline` (`time.monotonic`) on, also when one does, now and then."""

    def __init__(self, queue: IdleQueue[_MissedTogether], lock: ModelLock, deadline: float):
        self._queue, self._lock, self._deadline = queue, lock, deadline

    def wait_idle(self) -> None:
        self._queue.wait_idle(max(self._deadline - time.monotonic(), SPACING))
        if self._queue.dropped:
            raise _Dropped

    def __enter__(self) -> None:
        self.wait_idle()
        self._lock.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()


def _chunks(prompt: Prompt, places: Sequence[int]) -> list[ChunkToStore]:
    # A chunk that stands in a prompt several times may be several documents'.
    missed = {prompt.chunk_ids[i]: ChunkToStore(prompt.chunk_ids[i], prompt.chunk_texts[i]) for i in places}
    for ids, text, document, found, since in zip(
        prompt.chunk_ids,
        prompt.chunk_texts,
        prompt.chunk_documents,
        prompt.chunk_found,
        prompt.chunk_since,
        strict=True,
    ):
        if (chunk := missed.get(ids)) is not None:
            recognised = found and document is None
            chunk.join(ChunkToStore(ids, text, {} if recognised else {document: since}, since if recognised else None))
    return list(missed.values())


def _tell(count: int, error: Exception) -> None:
    reason = str(error) if isinstance(error, StoreError) else f"{type(error).__name__}: {error}"
    _log.warning("%d chunks of a request could not be stored and will be computed again: %s", count, reason)
