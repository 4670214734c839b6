"""Recognising a store's chunks in token ids, while any process adds and removes chunks.

The store has its chunks' texts. Each is tokenised again, alone as when it was stored, and the ids are checked against the chunk's key.
So a chunk is recognised only by the ids that it was computed from, even if the tokenizer has changed since.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from itertools import islice

from cachetune_rag.concurrency.forks import this_process
from cachetune_rag.errors import PromptError
from cachetune_rag.text.recognising.id_recognizer import IdRecognizer, Spell
from cachetune_rag.text.recognising.id_spans import IdSpan
from cachetune_store import ChunkKey, ChunkStore, Namespace, StoreError, make_key

LOOK_EVERY = 1.0
"""Seconds after which the store is asked again whether it has changed."""
SHARE_LOOKING = 0.05
"""Largest share of the time that is spent on listing a store's chunks again, while another process keeps adding some."""
SHARE_TOKENISING = 0.5
"""Share of the time that is spent on tokenising new texts, unless a thread waits for it in `catch_up`. The rest is left to requests."""

CLOSING = 2.0
"""Seconds that `close` waits for the thread to end."""

BATCH = 32  # texts
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class KnownSoFar:
    """What a recogniser knows of its store.

    Attributes:
        chunks: chunks that are recognised.
        waiting: chunks whose texts are still to be tokenised, as far as the store was looked at.
        unlike: chunks whose texts give other ids than those that they were computed from; they are not recognised.
        complete: whether all that the store had when it was last looked at has been read.
        error: why the store couldn't be read the last time; None if it could.
    """

    chunks: int
    waiting: int
    unlike: int
    complete: bool
    error: str | None = None


class _Kind(Enum):
    """What a chunk of the store turned out to be."""

    OWN = auto()  # belongs to one of the namespaces asked for
    UNLIKE = auto()  # belongs to one of them, but its text gives other ids now
    FOREIGN = auto()  # belongs to another namespace


class StoreIdRecognizer:
    """Recognises the chunks of one tenant in token ids, and follows what any process does to their store.

    A thread of its own begins to read the store when it is made. It can be asked at once, but doesn't find chunks
    that aren't read yet. Call `close` at the end. Memory: about a kilobyte and a half a chunk.

    Args:
        store: where the chunks are.
        namespaces: gives the namespaces whose chunks are recognised, all of one tenant (`LeadIns.namespaces`, say). It is asked
            again and again.
        encode_many: tokenises texts, each alone, as chunks are (`PromptBuilder.encode_many`).
        spell: says what tokens spell (`Spelling`).
        look_every: seconds; see `LOOK_EVERY`.
    """

    def __init__(
        self,
        store: ChunkStore,
        namespaces: Callable[[], Sequence[Namespace]],
        encode_many: Callable[[Sequence[str]], Sequence[Sequence[int]]],
        spell: Spell,
        look_every: float = LOOK_EVERY,
    ):
        self._store, self._namespaces, self._encode_many = store, namespaces, encode_many
        self._look_every = look_every
        self._recognizer = IdRecognizer(spell)
        self._origin = this_process()
        # Used by the thread alone.
        self._read_namespaces: tuple[Namespace, ...] = ()
        self._read_revision: int | None = None
        self._seen: dict[ChunkKey, _Kind] = {}  # chunks that were looked at
        self._listing_took = 0.0
        # Used by all threads, under the condition's lock.
        self._changes = threading.Condition()
        self._closed = self._hurried = False
        self._waiters = 0  # threads that wait for the store to be read
        self._looks = 0  # how many looks at the store have begun
        self._done = self._failed = 0  # number of the last look that succeeded, and of the last one that failed
        self._waiting = self._unlike = 0
        self._error: str | None = None
        self._thread = threading.Thread(target=self._run, name="cachetune-ids", daemon=True)
        self._thread.start()

    def find(self, prompt_ids: Sequence[int]) -> list[IdSpan]:
        """The chunks known so far that stand in a prompt; see `IdRecognizer.find`. The store is not asked.

        Raises:
            ForkedError: this process was forked since; the thread that follows the store is not here.
            PromptError: these are no token ids.
        """
        self._origin.check("the recogniser", "its thread stayed there")
        return self._recognizer.find(prompt_ids)

    def knows(self, ids: Sequence[int]) -> bool:
        """Whether these are the token ids of a chunk that is known so far. The store is not asked."""
        return self._recognizer.knows(ids)

    @property
    def cut_short(self) -> int:
        """See `IdRecognizer`."""
        return self._recognizer.cut_short

    @property
    def known(self) -> KnownSoFar:
        """How much of the store is known."""
        with self._changes:
            complete = self._done > self._failed and not self._waiting
            return KnownSoFar(len(self._recognizer), self._waiting, self._unlike, complete, self._error)

    def look_now(self) -> None:
        """The store has just changed, or may have: look at once."""
        with self._changes:
            self._hurried = True
            self._changes.notify_all()

    def catch_up(self, seconds: float | None = None) -> bool:
        """Wait until all is known that the store has now; False if that takes longer than `seconds`, or the store can't be read."""
        self._origin.check("the recogniser", "its thread stayed there")
        with self._changes:
            wanted = self._looks + 1
            self._hurried = True
            self._waiters += 1
            self._changes.notify_all()
            self._changes.wait_for(lambda: self._closed or max(self._done, self._failed) >= wanted, seconds)
            self._waiters -= 1
            return self._done >= wanted

    def close(self) -> None:
        """End the thread; what is known stays known. A thread that waits for a disk that doesn't answer is left behind."""
        with self._changes:
            self._closed = True
            self._changes.notify_all()
        if self._origin.here:
            self._thread.join(CLOSING)

    # -- on the thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._changes:
                self._hurried = False
                self._looks += 1
            error: str | None = None
            try:
                self._look()
            except (
                Exception
            ) as failure:  # whatever it is, the next look may go well, and requests go on with what is known
                self._read_revision = None
                error = str(failure) if isinstance(failure, StoreError) else f"{type(failure).__name__}: {failure}"
            with self._changes:
                if error is None:
                    self._done = self._looks
                else:
                    self._failed = self._looks
                    if error != self._error:
                        _log.warning("a store's texts can't be read, so its new chunks are not recognised: %s", error)
                self._error = error
                self._changes.notify_all()
                pause = max(self._look_every, self._listing_took / SHARE_LOOKING)
                self._changes.wait_for(lambda: self._closed or self._hurried, pause)
                if self._closed:
                    return

    def _look(self) -> None:
        """Learn what is new in the store, and forget what is gone."""
        self._listing_took = 0.0
        namespaces = tuple(self._namespaces())
        revision = self._store.revision()
        if (namespaces, revision) == (self._read_namespaces, self._read_revision):
            return
        if not set(self._read_namespaces) <= set(namespaces):
            self._forget(list(self._seen))
        elif namespaces != self._read_namespaces:
            self._forget([key for key, kind in self._seen.items() if kind is _Kind.FOREIGN])
        self._read_namespaces, self._read_revision = namespaces, None
        started = time.monotonic()
        there = self._store.text_keys()
        self._listing_took = time.monotonic() - started
        self._forget(self._seen.keys() - there)
        new = [key for key in there if key not in self._seen]
        with self._changes:
            self._waiting = len(new)
        for batch in _batches(new):
            started = time.monotonic()
            self._learn(batch, namespaces)
            pause = (time.monotonic() - started) * (1 / SHARE_TOKENISING - 1)
            with self._changes:
                self._waiting -= len(batch)
                self._changes.wait_for(lambda: self._closed or self._waiters > 0, pause)
                if self._closed:
                    return
        self._read_revision = revision

    def _forget(self, keys: Iterable[ChunkKey]) -> None:
        unlike = 0
        for key in keys:
            self._recognizer.remove(key)
            unlike += self._seen.pop(key) is _Kind.UNLIKE
        with self._changes:
            self._unlike -= unlike

    def _learn(self, keys: Sequence[ChunkKey], namespaces: Sequence[Namespace]) -> None:
        for namespace in namespaces:
            found = list(self._store.texts(namespace=namespace, keys=keys))
            unlike = 0
            for (key, _, _), ids in zip(found, self._ids_of([text for _, text, _ in found]), strict=True):
                if ids is not None and make_key(namespace, ids) == key:
                    self._seen[key] = _Kind.OWN
                    self._recognizer.add(key, ids)
                else:
                    self._seen[key] = _Kind.UNLIKE
                    unlike += 1
            if unlike:
                self._tell_unlike(unlike)
        for key in keys:
            self._seen.setdefault(key, _Kind.FOREIGN)

    def _ids_of(self, texts: Sequence[str]) -> list[Sequence[int] | None]:
        """The texts' token ids; None for one that can't be tokenised as content."""
        try:
            return list(self._encode_many(texts))
        except PromptError:
            if len(texts) == 1:
                return [None]
            return [ids for text in texts for ids in self._ids_of([text])]

    def _tell_unlike(self, count: int) -> None:
        with self._changes:
            first = not self._unlike
            self._unlike += count
        _log.log(
            logging.WARNING if first else logging.DEBUG,
            "%d stored chunks have texts that this tokenizer reads otherwise than it did when they were stored: they are not recognised "
            "in token ids, and will be once they are precomputed anew",
            count,
        )


def _batches(keys: Sequence[ChunkKey]) -> Iterator[list[ChunkKey]]:
    rest = iter(keys)
    while batch := list(islice(rest, BATCH)):
        yield batch
