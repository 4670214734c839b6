"""Finds the chunks of a store in finished prompts.

Frameworks often hand over one string in which the retrieved passages are not marked. `StoreRecognizer` knows the texts of the stored chunks
and cuts such a string into stored chunks (`Chunk`) and other text (`Text`). How they are found is in `text/recognising/`.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import TypeVar

from cachetune_rag.chunks.lead_ins import LeadIns
from cachetune_rag.concurrency.deadline import Call, call_directly
from cachetune_rag.text.prompts.prompt import Segment, Text
from cachetune_rag.text.recognising.chunk_recognizer import ANCHOR, ChunkRecognizer
from cachetune_store import ChunkKey, ChunkStore, StoreError

_PATIENCE = 0.05  # seconds that a prompt waits for the store to be read again

_T = TypeVar("_T")
_log = logging.getLogger(__name__)

__all__ = ["ANCHOR", "ChunkRecognizer", "StoreRecognizer"]


class StoreRecognizer:
    """Recognises the chunks of one engine in prompts, and follows what any process does to their store.

    The store's texts are read at the first use, and again when the store has changed. `chunk_stored` tells of the chunks that this process
    adds. Reading takes at most a twentieth of the time, and is done in the background if it takes long. Until then, chunks that other
    processes added are computed as plain text, which gives the same answers.

    Args:
        store: where the chunks are.
        lead_ins: know the namespaces of the engine's chunks.
        call: makes the calls that may touch the store's disk.
    """

    def __init__(self, store: ChunkStore, lead_ins: LeadIns, call: Call = call_directly):
        self._store, self._lead_ins, self._call = store, lead_ins, call
        self._known = ChunkRecognizer()
        self._lock, self._turn = threading.Lock(), threading.Lock()
        self._keys: set[ChunkKey] = set()
        self._revision: object = None
        self._read = self._reading = False
        self._took = self._due = 0.0

    def segments(self, content: str | Sequence[Segment | str]) -> list[Segment]:
        """Content in which the stored chunks are cut out of the texts, as `Chunk`. Joined, the texts are the same as before."""
        try:
            self._call(self._follow)
        except StoreError as error:
            # No reason to refuse a prompt: chunks that aren't recognised are computed as plain text.
            _log.warning("the store can't be asked for its texts: %s", error)
        parts: list[Segment | str] = [content] if isinstance(content, str) else list(content)
        segments: list[Segment] = []
        for part in parts:
            if isinstance(part, str | Text):
                segments += self._known.segment(part if isinstance(part, str) else part.text)
            else:
                segments.append(part)
        return segments

    @property
    def cut_short(self) -> int:
        """See `ChunkRecognizer`."""
        return self._known.cut_short

    def __len__(self) -> int:
        return len(self._known)

    def knows(self, text: str) -> bool:
        """Whether a stored chunk has exactly this text."""
        return self._known.knows(text)

    def scan(self, look: Callable[[Iterable[str]], _T]) -> _T:
        """What `look` returns for the stored texts, which are read from the store one after another.

        Raises:
            StoreError: they can't be read.
        """
        return self._call(lambda: look(self._texts()))

    def _texts(self) -> Iterator[str]:
        for namespace in self._lead_ins.namespaces:
            for _, text, _ in self._store.texts(namespace=namespace):
                yield text

    def chunk_stored(self, key: ChunkKey, text: str) -> None:
        """A chunk was just stored. Before the first use this does nothing, since all texts are read then."""
        with self._lock:
            if self._read:
                self._keys.add(key)
                self._known.add(key, text)

    def changed(self) -> None:
        """Chunks may just have been deleted: read the store again before the next prompt."""
        with self._lock:
            self._due, self._revision = 0.0, None

    def _follow(self) -> None:
        with self._turn:  # held while the caller reads the store, so that others wait for what it finds
            with self._lock:
                if self._reading or time.monotonic() < self._due:
                    return
                revision = self._store.revision()
                if revision == self._revision:
                    return
                later = self._read and self._took > _PATIENCE
                self._read = self._reading = True
                self._revision = revision
            if later:
                threading.Thread(target=self._catch_up, args=(True,), name="cachetune-texts", daemon=True).start()
            else:
                self._catch_up(False)

    def _catch_up(self, in_background: bool) -> None:
        """Read the store's texts: learn those that are new, forget those that are gone."""
        started = time.monotonic()
        before = set(self._keys)
        try:
            keys: set[ChunkKey] = set()
            namespaces = self._lead_ins.namespaces
            for key, text, _ in chain.from_iterable(self._store.texts(namespace=n) for n in namespaces):
                keys.add(key)
                if key not in before:
                    self._known.add(key, text)
            if gone := before - keys:
                # An evicted chunk stays known while a document holds it: it will be computed and stored again.
                documents = self._store.documents(tenant=namespaces[0].tenant)
                gone -= {key for document in documents for key in document.chunks}
            for key in gone:
                self._known.remove(key)
            with self._lock:
                self._keys = (self._keys | keys) - gone
        except StoreError:
            with self._lock:
                self._revision = None
            if not in_background:
                raise
        finally:
            with self._lock:
                self._reading = False
                self._took = time.monotonic() - started
                self._due = time.monotonic() + 19 * self._took
