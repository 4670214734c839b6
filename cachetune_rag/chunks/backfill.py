"""Chunks that requests missed: stored behind their answers, on a thread that gives way to requests."""

from __future__ import annotations

import _thread
import atexit
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING

from cachetune_rag.chunks.owners import ChunkToStore
from cachetune_rag.concurrency.deadline import Call
from cachetune_rag.concurrency.forks import this_process
from cachetune_rag.concurrency.model_lock import ModelLock
from cachetune_rag.text.prompts.prompt import Prompt
from cachetune_store import ChunkKey, StoreError

if TYPE_CHECKING:
    from cachetune_rag.chunks.precompute import Precomputer

WAITING = 128
"""Chunks that may wait to be stored; those beyond it are left to the next request that misses them."""
IDLE_SECONDS = 0.05
"""How long no request must have wanted the model before a chunk is computed."""
PATIENCE = 2.0
"""Seconds that chunks wait for that. A server that is never idle would compute them again and again otherwise."""
SPACING = 0.01
"""Seconds for requests between two forwards of chunks that wait no longer."""

_LOOK_AGAIN = 0.01

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Group:
    """What one request missed, and when that was."""

    chunks: list[ChunkToStore]
    since: float


class _Dropped(Exception):
    """What waits is not to be stored any more."""


class MissedChunks:
    """Stores what requests had to compute, for the next ones.

    A chunk is stored as precompute stores it, behind several lead-ins, which takes several times as long as the request took to
    compute it. So an answer doesn't wait for that. A chunk is computed when no request wants the model, one forward at a time, so
    that a request which comes meanwhile waits for one at most; after `PATIENCE` seconds its forwards take turns with requests. A
    request for a chunk that waits computes it itself, exactly, like any that is missing.

    A chunk of a document is stored under that document, so that it is deleted with it. If the document was removed, or replaced by a
    version without this chunk, after the request was built, the chunk isn't stored at all.

    Args:
        precomputer: computes and stores.
        call: makes the calls that may touch the store's disk.
        lock: the model's.
    """

    def __init__(self, precomputer: Precomputer, call: Call, lock: ModelLock):
        self._precomputer, self._call, self._model = precomputer, call, lock
        self._mutex = threading.Lock()
        self._pending: deque[_Group] = deque()
        self._known: dict[tuple[int, ...], ChunkToStore] = {}  # all that is pending, by its token ids
        self._late: SimpleQueue[tuple[Prompt, Sequence[int]]] = SimpleQueue()
        self._offering = threading.RLock()  # held while something of that is offered
        self._storing = threading.RLock()  # held while chunks are stored at once
        self._origin = this_process()
        self._thread: threading.Thread | None = None
        self._closed = self._dropped = False
        self._hurried = 0
        self._unstored = self._withdrawn = 0

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
        """Store chunks of a prompt now; how many could not be.

        Args:
            prompt: the prompt.
            missed: which of its chunks, each at most once.
        """
        chunks = _chunks(prompt, missed)
        if not self._known.keys().isdisjoint(chunk.ids for chunk in chunks):
            self.wait()  # the thread may be at them
        kept: list[ChunkKey] = []
        withdrawn: list[ChunkKey] = []
        try:
            if chunks:
                with self._storing:
                    self._precomputer.store_chunks(
                        chunks, call=self._call, kept=kept.append, withdrawn=withdrawn.append
                    )
        except StoreError as error:
            _tell(len(chunks) - len(kept) - len(withdrawn), error)
        with self._mutex:
            self._unstored += len(chunks) - len(kept) - len(withdrawn)
            self._withdrawn += len(withdrawn)
        return len(chunks) - len(kept)

    def offer(self, prompt: Prompt, missed: Sequence[int]) -> int:
        """Store chunks of a prompt when there is time for it; how many will be. Returns at once. Arguments as for `store`."""
        if not self._origin.here:
            return 0
        chunks = _chunks(prompt, missed)
        with self._mutex:
            new = []
            for chunk in chunks:
                if (known := self._known.get(chunk.ids)) is None:
                    new.append(chunk)
                else:
                    known.join(chunk)
            room = 0 if self._closed else max(0, WAITING - len(self._known))
            taken, refused = new[:room], len(new[room:])
            self._unstored += refused
            if taken:
                self._known.update((chunk.ids, chunk) for chunk in taken)
                self._pending.append(_Group(taken, time.monotonic()))
            # Ctrl-C may have kept the last one from being started.
            if self._pending and (self._thread is None or not self._thread.is_alive()):
                # A thread inside of torch while the interpreter goes away would crash the process.
                atexit.register(self.drop)
                self._thread = threading.Thread(target=self._run, name="cachetune-missed", daemon=True)
                self._thread.start()
        return len(chunks) - refused

    def offer_from_anywhere(self, prompt: Prompt, missed: Sequence[int]) -> None:
        """As `offer`, for a caller that may hold any lock (garbage collection): it waits for none."""
        if not missed or not self._origin.here:
            return
        self._late.put((prompt, missed))
        with suppress(RuntimeError):  # the interpreter is going away
            _thread.start_new_thread(self._offer_late, ())

    def forget(self, document: str) -> None:
        """Drop what waits and belongs to this document alone. When this returns, nothing of it is being stored either."""
        self._offer_late()
        with self._mutex:
            at_hand = self._pending[0] if self._pending else None
            for group in self._pending:
                for chunk in list(group.chunks):
                    if document not in chunk.owners:
                        continue
                    del chunk.owners[document]
                    if not chunk.wanted and group is not at_hand:
                        group.chunks.remove(chunk)
                        self._known.pop(chunk.ids, None)
                        self._withdrawn += 1
        with self._storing:  # wait for the chunk that is being stored right now
            pass
        self._hurry(1)
        try:
            while at_hand is not None and at_hand in list(self._pending):
                thread = self._thread
                if thread is None or not thread.is_alive():
                    break
                thread.join(_LOOK_AGAIN)
        finally:
            self._hurry(-1)

    def wait(self, timeout: float | None = None) -> bool:
        """Store what waits without waiting for the model to be idle; False if that took longer than `timeout` seconds."""
        until = None if timeout is None else time.monotonic() + timeout
        self._offer_late()
        self._hurry(1)
        try:
            while (thread := self._thread) is not None and thread.is_alive():
                thread.join(None if until is None else max(0.0, until - time.monotonic()))
                if until is not None and time.monotonic() >= until:
                    return not self._known
        finally:
            self._hurry(-1)
        return True

    def close(self) -> None:
        """Store what waits, and take no more. Interrupted by an exception (Ctrl-C), it drops what still waits."""
        self._offer_late()
        with self._mutex:
            self._closed = True
        try:
            self.wait()
        except BaseException:
            self.drop()
            raise

    def drop(self) -> None:
        """Drop what waits, and end what runs behind the forward at hand."""
        if not self._origin.here:
            return
        with self._mutex:
            self._closed = self._dropped = True
        self.wait()

    # -- the thread -----------------------------------------------------------------------------------------------

    def _hurry(self, more: int) -> None:
        with self._mutex:
            self._hurried += more
        self._model.wake()

    def _offer_late(self) -> None:
        """Offer what `offer_from_anywhere` took in."""
        if not self._origin.here:
            return
        with self._offering:
            while True:
                try:
                    late = self._late.get_nowait()
                except Empty:
                    return
                self.offer(*late)

    def _run(self) -> None:
        """Store what is pending; the thread ends when nothing is."""
        while True:
            with self._mutex:
                if self._dropped:
                    self._unstored += len(self._known)
                    self._pending.clear()
                    self._known.clear()
                if not self._pending:
                    self._thread = None
                    atexit.unregister(self.drop)
                    return
                group = self._pending[0]
            before = [set(chunk.owners) for chunk in group.chunks]
            lost, withdrawn = self._attempt(group)
            with self._mutex:
                self._pending.popleft()
                for chunk in group.chunks:
                    self._known.pop(chunk.ids, None)
                self._unstored += lost
                self._withdrawn += withdrawn
                # What another request missed meanwhile, as another document's: it is stored by now.
                late = [
                    chunk for chunk, owners in zip(group.chunks, before, strict=True) if chunk.owners.keys() - owners
                ]
                if late and not self._closed:
                    self._known.update((chunk.ids, chunk) for chunk in late)
                    self._pending.append(_Group(late, group.since))

    def _attempt(self, group: _Group) -> tuple[int, int]:
        """How many of the chunks could not be stored, and how many are not wanted any more. Whatever went wrong, no request is told
        of it."""
        kept: list[ChunkKey] = []
        withdrawn: list[ChunkKey] = []
        try:
            turn = _Turn(self, group.since + PATIENCE)
            turn.await_idle()
            self._precomputer.store_chunks(
                group.chunks, call=self._call, kept=kept.append, withdrawn=withdrawn.append, turn=turn
            )
        except _Dropped:
            pass
        except Exception as error:
            if not self._dropped:
                _tell(len(group.chunks) - len(kept) - len(withdrawn), error)
        return max(0, len(group.chunks) - len(kept) - len(withdrawn)), len(withdrawn)


class _Turn:
    """The model's lock, taken when no request wants the model, or from `deadline` (`time.monotonic`) on, now and then."""

    def __init__(self, owner: MissedChunks, deadline: float):
        self._owner, self._deadline = owner, deadline

    def await_idle(self) -> None:
        owner = self._owner
        rest = max(self._deadline - time.monotonic(), SPACING)
        owner._model.wait_idle(IDLE_SECONDS, lambda: owner._dropped or owner._hurried > 0, rest)
        if owner._dropped:
            raise _Dropped

    def __enter__(self) -> None:
        self.await_idle()
        self._owner._model.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._owner._model.release()


def _chunks(prompt: Prompt, places: Sequence[int]) -> list[ChunkToStore]:
    # A chunk that stands in a prompt several times may be several documents'.
    missed = {prompt.chunk_ids[i]: ChunkToStore(prompt.chunk_ids[i], prompt.chunk_texts[i]) for i in places}
    for ids, document, found, since in zip(
        prompt.chunk_ids, prompt.chunk_documents, prompt.chunk_found, prompt.chunk_since, strict=True
    ):
        if (chunk := missed.get(ids)) is not None:
            recognised = found and document is None
            chunk.join(
                ChunkToStore(ids, chunk.text, {} if recognised else {document: since}, since if recognised else None)
            )
    return list(missed.values())


def _tell(count: int, error: Exception) -> None:
    reason = str(error) if isinstance(error, StoreError) else f"{type(error).__name__}: {error}"
    _log.warning("%d chunks of a request could not be stored and will be computed again: %s", count, reason)
