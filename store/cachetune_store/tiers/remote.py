"""Chunks in a place that many machines share."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from ..buffers import SlabPool
from ..chunk import Chunk, ChunkHead
from ..chunkfile import encode_file, parse_head
from ..errors import (
    DamagedChunkError,
    ErasedChunkError,
    MissingObjectError,
    RemoteError,
    StoreError,
    StoreKeyError,
    UnknownCodecError,
)
from ..index import Index
from ..keys import ChunkKey, make_key
from ..remote.breaker import Breaker
from ..remote.catalogue import Catalogue
from ..remote.changes import Op, object_name
from ..remote.file import RemoteFile
from ..remote.objects import Objects
from ..remote.reader import RemoteReader
from ..stats import Counters, TierStats
from ..texts import drop_text, evict_text
from ..tier_kinds import REMOTE
from ..transcoding import transcoded
from ..units import MOST_BYTES
from .base import LastingTier, Pins

__all__ = ["RemoteTier"]

_SCRATCH = 64 << 20
"""Bytes of unused memory that are kept for reading rows of encrypted objects."""


class RemoteTier(LastingTier):
    """An object for each chunk: the chunk's file as on disk, in the tier's own codec if it has one.

    Which chunks are there, the catalogue says; nothing is asked of the place for that. Chunks stay as long as documents hold them, or until
    they are removed: there is no budget, because no machine knows what the others use.

    A place that fails is left alone for a while. Chunks are then misses, and `errors` of `open` says so.

    Args:
        objects: the place.
        index: the store's index.
        pins: chunks in use by this process.
        pool: gives the memory that rows are read into.
        codec: how chunks are encoded there; None: as they come.
        behind: a faster tier lasts, too. Chunks are then written behind the caller's back, from what `source` gives.
        source: a chunk that is to be written; None if it isn't here any more.
        catalogue: makes the catalogue, given what writes a chunk to the place.
    """

    kind = REMOTE

    def __init__(
        self,
        objects: Objects,
        *,
        index: Index,
        pins: Pins,
        pool: SlabPool,
        codec: str | None,
        behind: bool,
        source: Callable[[ChunkKey], Chunk | None],
        catalogue: Callable[[Callable[[ChunkKey], Op | None]], Catalogue],
    ) -> None:
        self.budget = MOST_BYTES
        self.counters = Counters()
        self.breaker = Breaker()
        self.catalogue = catalogue(self._upload_stored)
        self._objects, self._index, self._pins, self._pool = objects, index, pins, pool
        self._scratch = SlabPool(pinned=False, limit=_SCRATCH)
        self._codec, self._behind, self._source = codec, behind, source
        self._lock = threading.Lock()

    def contains(self, key: ChunkKey) -> bool:
        """See Tier."""
        return self.catalogue.find(key) is not None

    def holds(self, key: ChunkKey, *, with_text: bool) -> bool:
        """See LastingTier."""
        return self.contains(key) and not (with_text and self._index.get(f"text/{key}") is None)

    def size_of(self, key: ChunkKey) -> int:
        """See Tier."""
        record = self.catalogue.find(key)
        return 0 if record is None else int(record["size"])

    def open(self, key: ChunkKey, errors: list[StoreError] | None = None) -> RemoteReader | None:
        """See Tier. One request is made, for the chunk's head."""
        errors = [] if errors is None else errors
        record = self.catalogue.find(key)
        pin = self._pins.add(key)
        reader = None if record is None else self._open(key, record, errors)
        if reader is not None:
            reader.pin = pin
        with self._lock:
            self.counters.hits += reader is not None
            self.counters.misses += reader is None
        return reader

    def heads(self) -> Iterator[tuple[ChunkKey, ChunkHead | Exception]]:
        """See Tier. Each takes a request."""
        for key in self.catalogue.chunks():
            errors: list[StoreError] = []
            reader = self.open(key, errors)
            if reader is not None:
                with reader:
                    yield key, reader.head
            elif errors:
                yield key, errors[0]

    def touch(self, key: ChunkKey) -> None:
        """See Tier. Nothing is evicted here, so uses don't matter."""

    def admit(self, chunk: Chunk) -> list[Chunk]:
        """See Tier. If no faster tier lasts, the chunk is in the place when this returns; else it will be."""
        if self._behind:
            self.offer(chunk.key)
            return []
        op = self._upload(chunk)
        with self._index.transaction():
            self.catalogue.removed(chunk.key)  # one without its text, which this one has
            self.catalogue.written(op)
            self.catalogue.add(op)
        return []

    def offer(self, key: ChunkKey) -> None:
        """See LastingTier."""
        if not self.contains(key) and not self.catalogue.is_waiting(key):
            self.catalogue.add({"op": "chunk", "key": key.digest})

    def remove(self, key: ChunkKey) -> int:
        """See Tier. It is deleted in the place, and on other machines, once they are told."""
        size = self.catalogue.removed(key)
        drop_text(self._index, key)
        return size

    def set_aside(self, key: ChunkKey) -> bool:
        """See LastingTier. The object is read again for that, and deleted if it is damaged."""
        record = self.catalogue.find(key)
        if record is None or not self._is_damaged(key, record):
            return False
        self.catalogue.removed(key, unusable=True)
        evict_text(self._index, key)
        with self._lock:
            self.counters.damaged += 1
        return True

    def flush(self) -> None:
        """See LastingTier. Nothing is collected."""

    def failed(self, error: Exception) -> None:
        """Count a request that failed, and leave the place alone for a while."""
        self.breaker.failed(str(error))
        with self._lock:
            self.counters.failed += 1

    def stats(self) -> TierStats:
        """See Tier."""
        chunks, size = self.catalogue.totals()
        with self._lock:
            return TierStats(self.name, chunks, size, self.budget, len(self._pins), **asdict(self.counters))

    def close(self) -> None:
        """See Tier."""
        self._objects.close()

    def _open(self, key: ChunkKey, record: dict[str, Any], errors: list[StoreError]) -> RemoteReader | None:
        if not self.breaker.closed:
            errors.append(
                RemoteError(f"chunk {key} is not asked for, because the remote tier failed: {self.breaker.reason}")
            )
            return None
        file = RemoteFile(self._objects, record["object"], record["size"], record["head"])
        try:
            parsed = parse_head(key, file.size, file.head, self.catalogue.seal())
        except UnknownCodecError:
            return None
        except MissingObjectError:
            self._lost(key)
            return None
        except StoreKeyError as error:  # the place has another key since it was last seen
            errors.append(error)
            return None
        except RemoteError as error:
            self.failed(error)
            errors.append(error)
            return None
        except ErasedChunkError as error:
            self._lost(key)
            errors.append(error)
            return None
        except DamagedChunkError as error:
            if self.set_aside(key):
                errors.append(DamagedChunkError(f"chunk {key} was damaged and is set aside: {error}"))
            return None
        self.breaker.worked()
        file.drop_head()
        return RemoteReader(parsed, file, self._pool, self.failed, self._scratch)

    def _lost(self, key: ChunkKey) -> None:
        """The object of a chunk is gone: from now on the chunk is an ordinary miss, and may be written again."""
        self.catalogue.removed(key, unusable=True)
        evict_text(self._index, key)

    def _is_damaged(self, key: ChunkKey, record: dict[str, Any]) -> bool:
        """Whether the object of `key` is damaged. One that can't be read now is not known to be."""
        if not self.breaker.closed:
            return False  # the place has just failed: asked again, it would only cost the caller another wait
        file = RemoteFile(self._objects, record["object"], record["size"], record["head"])
        failures: list[Exception] = []
        try:
            parsed = parse_head(key, file.size, file.head, self.catalogue.seal())
            RemoteReader(parsed, file, self._pool, failures.append).read_all()
            head = parsed.head
            return make_key(head.namespace, head.token_ids.tolist()) != key
        except (UnknownCodecError, StoreKeyError):
            return False
        except DamagedChunkError as error:
            if isinstance(error.__cause__, OSError) and isinstance(error.__cause__.__cause__, MissingObjectError):
                self._lost(key)
                return False
            return not failures  # a request that failed says nothing about the object
        except MissingObjectError:
            self._lost(key)
            return False
        except RemoteError as error:
            self.failed(error)
            return False

    def _upload_stored(self, key: ChunkKey) -> Op | None:
        chunk = self._source(key)
        return None if chunk is None else self._upload(chunk)

    def _upload(self, chunk: Chunk) -> Op:
        """Write a chunk to the place. Returns what the others are to be told of it."""
        seal = self.catalogue.seal()
        if self._codec is not None:
            chunk = transcoded(chunk, self._codec, self._pool, seal.in_memory)
        text = chunk.head.text
        (head, rows), name = encode_file(chunk, seal), object_name(seal.chunk_name(chunk.key))
        size = len(head) + sum(map(len, rows))
        try:
            self._objects.put(name, [head, *rows])
        except RemoteError as error:
            self.failed(error)
            raise
        with self._lock:
            self.counters.bytes_written += size
        return {
            "op": "chunk",
            "key": chunk.key.digest,
            "object": name,
            "size": size,
            "head": len(head),
            "tokens": chunk.head.layout.tokens,
            "text": text if text is None else seal.hide_text(chunk.head.namespace.tenant, chunk.key, text),
            "namespace": chunk.head.namespace.digest,
        }
