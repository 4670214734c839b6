"""Looking up the chunks of one prompt: which are open, which are missing, and which could not be read and why."""

from __future__ import annotations

import threading
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

from cachetune_rag.concurrency.deadline import DeadlinePool
from cachetune_rag.concurrency.workers import Job
from cachetune_rag.readahead.prefetcher import Prefetcher
from cachetune_rag.text.prompts.prompt import Prompt, Span
from cachetune_store import ChunkKey, ChunkReader, ChunkStore, DamagedChunkError, Namespace, StoreError, make_key
from cachetune_store.tier_kinds import rank

KNOWN_KEYS = 2048
"""Chunks whose key is remembered: those of a few dozen long prompts."""

Start = Callable[..., Job[Any]]
"""`start(work, *args)` starts a call on another thread."""


class OpenReaders:
    """The readers of one request, closed when it is done. A lookup that timed out may still open some later: they are closed at once."""

    def __init__(self) -> None:
        self._readers: list[ChunkReader] = []
        self._closed = False
        self._lock = threading.Lock()

    def close_later(self, reader: ChunkReader) -> None:
        """Close a reader together with the others."""
        with self._lock:
            late = self._closed
            if not late:
                self._readers.append(reader)
        if late:
            reader.close()

    def release(self, reader: ChunkReader) -> None:
        """Leave a reader open: the caller closes it."""
        with self._lock:
            self._readers.remove(reader)

    def close(self) -> None:
        """Close them all."""
        with self._lock:
            self._closed = True
            readers, self._readers = self._readers, []
        for reader in readers:
            reader.close()


class Faults:
    """Chunks that a request goes on without, although they are stored or may be.

    Attributes:
        damaged: chunks that failed a check; the store has set them aside.
        unreadable: chunks that the system refused to read.
        timed_out: chunks that may be on the disk, which did not answer in time.
        disk_gone: the disk did not answer in time, so only chunks in memory are used.
    """

    def __init__(self) -> None:
        self.damaged: set[ChunkKey] = set()
        self.unreadable: set[ChunkKey] = set()
        self.timed_out: set[ChunkKey] = set()
        self.disk_gone = False

    @property
    def any(self) -> bool:
        """Whether there are any."""
        return self.disk_gone or bool(self.damaged or self.unreadable or self.timed_out)

    def open(
        self,
        store: ChunkStore,
        keys: Iterable[ChunkKey],
        opened: OpenReaders,
        start: Start,
        taken: Mapping[ChunkKey, ChunkReader],
    ) -> dict[ChunkKey, ChunkReader | None]:
        """Open chunks: a reader for each, None for those that are not stored or failed earlier in this request.

        Args:
            store: where the chunks are.
            keys: the chunks' keys, each once.
            opened: gets every reader.
            start: starts a call on a thread. Files are opened side by side, because a disk takes far longer to answer than to read
                the head of a file.
            taken: readers that are open already.
        """
        readers: dict[ChunkKey, ChunkReader | None] = {}
        waiting: dict[ChunkKey, Job[tuple[ChunkReader | None, list[StoreError]]]] = {}
        for there in taken.values():
            opened.close_later(there)
        readers.update(taken)
        for key in keys:
            if key in taken:
                continue
            failed = key in self.damaged or key in self.unreadable
            reader = readers[key] = None if failed else store.open_in_memory(key)
            if reader is not None:
                opened.close_later(reader)
            elif self.disk_gone and not failed:
                self.timed_out.add(key)
            elif not failed:
                waiting[key] = start(_open, store, key, opened)
        for key, future in waiting.items():
            readers[key], errors = future.result()
            for error in errors:
                self.failed(key, set_aside=isinstance(error, DamagedChunkError))
        return readers

    def failed(self, key: ChunkKey, *, set_aside: bool) -> None:
        """Remember that reading a chunk failed: it is damaged and was set aside, or it could not be read for another reason."""
        (self.damaged if set_aside else self.unreadable).add(key)


def _open(store: ChunkStore, key: ChunkKey, opened: OpenReaders) -> tuple[ChunkReader | None, list[StoreError]]:
    errors: list[StoreError] = []
    reader = store.open(key, errors=errors)
    if reader is not None:
        opened.close_later(reader)  # at once, because the request may have given up waiting
    return reader, errors


@dataclass(frozen=True)
class FoundChunks:
    """The chunks of one prompt, as the lookup found them.

    Attributes:
        chunks: span and reader of each chunk that is stored, in prompt order.
        missed: tokens of the prompt that belong to the other chunks.
        to_store: numbers of the missed chunks, for storing them (equal chunks once; not those that may be on a disk that timed out).
    """

    chunks: tuple[tuple[Span, ChunkReader], ...]
    missed: int = 0
    to_store: tuple[int, ...] = ()

    @property
    def readers(self) -> list[ChunkReader]:
        """The readers, each once."""
        return list({id(reader): reader for _, reader in self.chunks}.values())

    @property
    def tokens(self) -> int:
        """Tokens of the prompt that belong to the stored chunks."""
        return sum(span.end - span.start for span, _ in self.chunks)

    @property
    def on_disk(self) -> list[ChunkKey]:
        """Keys of the chunks whose rows must be waited for."""
        return [reader.key for _, reader in self.chunks if not reader.in_memory]

    def only(self, keys: Container[ChunkKey]) -> FoundChunks:
        """The same without the chunks of other keys, whose tokens count as missed."""
        chunks = tuple((span, reader) for span, reader in self.chunks if reader.key in keys)
        others = sum(span.end - span.start for span, reader in self.chunks if reader.key not in keys)
        return FoundChunks(chunks, self.missed + others, self.to_store)

    def bytes_read(self) -> dict[str, int]:
        """Bytes read so far, by tier."""
        read: dict[str, int] = {}
        for reader in self.readers:
            read[reader.tier] = read.get(reader.tier, 0) + reader.bytes_read
        return read

    def slowest(self) -> tuple[str, str]:
        """As `slowest`, of the chunks."""
        return slowest((span, reader.tier, reader.layout.codec) for span, reader in self.chunks)


def slowest(chunks: Iterable[tuple[Span, str, str]]) -> tuple[str, str]:
    """The slowest tier among chunks, of each of which the place in the prompt, the tier and the codec is given; and the codec of most of their tokens there."""
    tokens: dict[tuple[int, str, str], int] = {}
    for span, tier, codec in chunks:
        place = rank(tier), tier, codec
        tokens[place] = tokens.get(place, 0) + span.end - span.start
    last = max(speed for speed, *_ in tokens)
    _, tier, codec = max((place for place in tokens if place[0] == last), key=lambda place: tokens[place])
    return tier, codec


class ChunkLookup:
    """Finds the chunks of prompts in the store.

    Args:
        store: where they are.
        pool: threads that open files.
        prefetcher: may have some of them open already, and partly read.
    """

    def __init__(self, store: ChunkStore, pool: DeadlinePool, prefetcher: Prefetcher | None):
        self._store, self._pool, self._prefetcher = store, pool, prefetcher
        self._known_keys: tuple[Namespace, Callable[[tuple[int, ...]], ChunkKey]] | None = None

    def keys(self, prompt: Prompt, namespace: Namespace) -> list[ChunkKey | None]:
        """The key of each chunk of a prompt; None for empty ones."""
        key_of = self._keys_of(namespace)
        return [key_of(ids) if ids else None for ids in prompt.chunk_ids]

    def find(self, prompt: Prompt, namespace: Namespace, opened: OpenReaders, faults: Faults) -> FoundChunks:
        """Open the chunks of a prompt that are stored. `opened` gets every reader, for the caller to close."""
        keys = self.keys(prompt, namespace)
        wanted = dict.fromkeys(key for key in keys if key is not None)
        taken: dict[ChunkKey, ChunkReader] = {}
        if self._prefetcher is not None and not faults.disk_gone:
            taken = self._prefetcher.take(wanted)
        readers = faults.open(self._store, wanted, opened, self._pool.submit, taken)
        found: list[tuple[Span, ChunkReader]] = []
        missed, to_store, seen = 0, [], set()
        for span in prompt.spans:
            key = keys[span.chunk]
            if key is None:
                continue
            if (reader := readers[key]) is not None:
                found.append((span, reader))
                continue
            missed += span.end - span.start
            if key not in faults.timed_out and key not in seen:
                to_store.append(span.chunk)
            seen.add(key)
        return FoundChunks(tuple(found), missed, tuple(to_store))

    def _keys_of(self, namespace: Namespace) -> Callable[[tuple[int, ...]], ChunkKey]:
        """Gives keys for token ids, and remembers them: hashing a prompt's chunks takes a millisecond, and prompts repeat chunks."""
        known = self._known_keys
        if known is None or known[0] is not namespace:
            # A cache for each namespace: with the namespace in every entry, its lead-ins (a thousand numbers) would be hashed each time.
            known = self._known_keys = namespace, lru_cache(KNOWN_KEYS)(partial(make_key, namespace))
        return known[1]
