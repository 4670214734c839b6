"""Chunks that requests missed: stored behind their answers, on a thread that gives way to requests."""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

from cachetune_rag.deadline import Call
from cachetune_rag.model_lock import ModelLock
from cachetune_rag.prompt import Prompt
from cachetune_store import ChunkKey, StoreError

if TYPE_CHECKING:
    from cachetune_rag.precompute import Precomputer

WAITING = 128
"""Chunks that may wait to be stored; those beyond it are left to the next request that misses them."""
IDLE_SECONDS = 0.05
"""How long no request must have wanted the model before a chunk is computed."""
PATIENCE = 2.0
"""Seconds that chunks wait for that. A server that is never idle would compute them again and again otherwise."""
SPACING = 0.01
"""Seconds for requests between two forwards of chunks that wait no longer."""

_log = logging.getLogger(__name__)

MissedChunk = tuple[tuple[int, ...], str]
"""Token ids and text of a chunk."""


@dataclass(frozen=True)
class _Group:
    """What one request missed, and when that was."""

    chunks: list[MissedChunk]
    since: float


class _Dropped(Exception):
    """What waits is not to be stored any more."""


class MissedChunks:
    """Stores what requests had to compute, for the next ones.

    A chunk is stored as precompute stores it, behind several lead-ins, which takes several times as long as the request took to
    compute it. So an answer doesn't wait for that. A chunk is computed when no request wants the model, one forward at a time, so
    that a request which comes meanwhile waits for one at most; after `PATIENCE` seconds its forwards take turns with requests. A
    request for a chunk that waits computes it itself, exactly, like any that is missing.

    Args:
        precomputer: computes and stores.
        call: makes the calls that may touch the store's disk.
        lock: the model's.
    """

    def __init__(self, precomputer: Precomputer, call: Call, lock: ModelLock):
        self._precomputer, self._call, self._model = precomputer, call, lock
        self._mutex = threading.Lock()
        self._pending: deque[_Group] = deque()
        self._known: set[tuple[int, ...]] = set()  # token ids of all that is pending
        self._thread: threading.Thread | None = None
        self._closed = self._dropped = False
        self._hurried = 0
        self._unstored = 0

    @property
    def waiting(self) -> int:
        """Chunks that are still to be stored."""
        return len(self._known)

    @property
    def unstored(self) -> int:
        """Chunks that could not be stored, so far."""
        return self._unstored

    def store(self, prompt: Prompt, missed: Sequence[int]) -> int:
        """Store chunks of a prompt now; how many could not be.

        Args:
            prompt: the prompt.
            missed: which of its chunks, each at most once.
        """
        chunks = _chunks(prompt, missed)
        if not self._known.isdisjoint(ids for ids, _ in chunks):
            self.wait()  # the thread may be at them
        kept: list[ChunkKey] = []
        try:
            if chunks:
                self._precomputer.store_chunks(chunks, call=self._call, kept=kept.append)
        except StoreError as error:
            _tell(len(chunks) - len(kept), error)
        with self._mutex:
            self._unstored += len(chunks) - len(kept)
        return len(chunks) - len(kept)

    def offer(self, prompt: Prompt, missed: Sequence[int]) -> int:
        """Store chunks of a prompt when there is time for it; how many will be. Returns at once. Arguments as for `store`."""
        chunks = _chunks(prompt, missed)
        with self._mutex:
            new = [chunk for chunk in chunks if chunk[0] not in self._known]
            room = 0 if self._closed else WAITING - len(self._known)
            taken, refused = new[:room], len(new[room:])
            self._unstored += refused
            if taken:
                self._known.update(ids for ids, _ in taken)
                self._pending.append(_Group(taken, time.monotonic()))
            # Ctrl-C may have kept the last one from being started.
            if self._pending and (self._thread is None or not self._thread.is_alive()):
                # A thread inside of torch while the interpreter goes away would crash the process.
                atexit.register(self.drop)
                self._thread = threading.Thread(target=self._run, name="cachetune-missed", daemon=True)
                self._thread.start()
        return len(chunks) - refused

    def wait(self, timeout: float | None = None) -> bool:
        """Store what waits without waiting for the model to be idle; False if that took longer than `timeout` seconds."""
        until = None if timeout is None else time.monotonic() + timeout
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
        with self._mutex:
            self._closed = True
        try:
            self.wait()
        except BaseException:
            self.drop()
            raise

    def drop(self) -> None:
        """Drop what waits, and end what runs behind the forward at hand."""
        with self._mutex:
            self._closed = self._dropped = True
        self.wait()

    # -- the thread -----------------------------------------------------------------------------------------------

    def _hurry(self, more: int) -> None:
        with self._mutex:
            self._hurried += more
        self._model.wake()

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
            lost = self._attempt(group)
            with self._mutex:
                self._pending.popleft()
                self._known.difference_update(ids for ids, _ in group.chunks)
                self._unstored += lost

    def _attempt(self, group: _Group) -> int:
        """How many of the chunks could not be stored. Whatever went wrong, no request is told of it."""
        kept: list[ChunkKey] = []
        try:
            turn = _Turn(self, group.since + PATIENCE)
            turn.await_idle()
            self._precomputer.store_chunks(group.chunks, call=self._call, kept=kept.append, turn=turn)
        except _Dropped:
            pass
        except Exception as error:
            if not self._dropped:
                _tell(len(group.chunks) - len(kept), error)
        return len(group.chunks) - len(kept)


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


def _chunks(prompt: Prompt, places: Sequence[int]) -> list[MissedChunk]:
    return [(tuple(prompt.chunk_ids[i]), prompt.chunk_texts[i]) for i in places]


def _tell(count: int, error: Exception) -> None:
    reason = str(error) if isinstance(error, StoreError) else f"{type(error).__name__}: {error}"
    _log.warning("%d chunks of a request could not be stored and will be computed again: %s", count, reason)
