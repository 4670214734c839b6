"""The precompute job: run chunks through the model alone, rank their tokens, store them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import RLock

from cachetune_rag.documents import Document
from cachetune_rag.errors import PromptTooLongError
from cachetune_rag.model import ModelAdapter
from cachetune_rag.report import PrecomputeSummary
from cachetune_rag.selection.frequency import frequency_scores
from cachetune_store import Chunk as StoredChunk
from cachetune_store import ChunkKey, ChunkStore, Namespace, make_key


@dataclass(frozen=True)
class Progress:
    """How far a precompute job is; handed to its callback after every stored batch and every document.

    Attributes:
        document: id of the document at hand.
        documents: documents finished.
        chunks, skipped: chunks computed, and found stored.
        tokens: tokens computed.
        bytes: bytes stored.
        seconds: since the start.
    """

    document: str
    documents: int
    chunks: int
    skipped: int
    tokens: int
    bytes: int
    seconds: float


@dataclass(frozen=True)
class _Chunk:
    key: ChunkKey
    ids: tuple[int, ...]
    text: str


class Precomputer:
    """Computes and stores chunks. Memory holds one batch on its way to the store, however large the corpus is."""

    def __init__(
        self,
        adapter: ModelAdapter,
        store: ChunkStore,
        namespace: Namespace,
        encode: Callable[[str], Sequence[int]],
        lock: RLock,
        batch_tokens: int,
        stored: Callable[[ChunkKey, str], None],
    ):
        self._adapter, self._store, self._namespace = adapter, store, namespace
        self._encode, self._lock, self._batch_tokens, self._stored = encode, lock, batch_tokens, stored

    def store_chunks(self, chunks: Iterable[tuple[Sequence[int], str]]) -> int:
        """Compute and store chunks given as (token ids, text). Returns the bytes stored."""
        wanted = [_Chunk(make_key(self._namespace, ids), tuple(ids), text) for ids, text in chunks]
        return sum(self._write(self._compute(batch)) for batch in self._batches(wanted))

    def run(
        self, documents: Iterable[Document | str], progress: Callable[[Progress], None] | None
    ) -> PrecomputeSummary:
        """The job. A document is registered when all its chunks are stored, so a run that is cut off resumes there."""
        started = time.perf_counter()
        count = chunks = skipped = tokens = stored = 0

        def tell(document: Document) -> None:
            if progress is not None:
                progress(Progress(document.id, count, chunks, skipped, tokens, stored, time.perf_counter() - started))

        # One writer: the next batch computes while the last one is written and synced.
        with ThreadPoolExecutor(1, "cachetune-write") as writer:
            for document in map(Document.of, documents):
                every = [self._chunk(document, text) for text in document.chunks]
                named = [c for c in every if c.ids]
                new = {c.key: c for c in named if not self._store.contains(c.key)}
                skipped += len(named) - len(new)
                pending: Future[int] | None = None
                for batch in self._batches(list(new.values())):
                    encoded = self._compute(batch)
                    if pending is not None:
                        stored += pending.result()
                    pending = writer.submit(self._write, encoded)
                    chunks += len(batch)
                    tokens += sum(len(c.ids) for c in batch)
                    tell(document)
                if pending is not None:
                    stored += pending.result()
                self._store.set_document(document.id, [c.key for c in named], tenant=self._namespace.tenant)
                count += 1
                tell(document)
        return PrecomputeSummary(count, chunks, skipped, tokens, stored, time.perf_counter() - started)

    def _chunk(self, document: Document, text: str) -> _Chunk:
        ids = tuple(self._encode(text))
        limit = self._adapter.max_positions
        if limit is not None and len(ids) + len(self._namespace.lead_ins[0]) > limit:
            raise PromptTooLongError(
                f"document {document.id!r} has a chunk of {len(ids)} tokens; the model reads at most {limit}. "
                "Split it into smaller chunks (512 tokens is a good size)."
            )
        return _Chunk(make_key(self._namespace, ids), ids, text)

    def _batches(self, chunks: list[_Chunk]) -> Iterator[list[_Chunk]]:
        """Neighbours of about one length, so that little is padded."""
        batch: list[_Chunk] = []
        for chunk in sorted(chunks, key=lambda c: len(c.ids)) if self._batch_tokens else chunks:
            if batch and len(chunk.ids) * (len(batch) + 1) > self._batch_tokens:
                yield batch
                batch = []
            batch.append(chunk)
        if batch:
            yield batch

    def _compute(self, batch: list[_Chunk]) -> list[StoredChunk]:
        """Capture, rank and encode. All on the thread that computes: a second thread with torch work would only fight
        with this one for the cores.
        """
        with self._lock:
            captured = self._adapter.capture([c.ids for c in batch], self._namespace.lead_ins[0])
            return [
                self._store.encode(
                    chunk.key,
                    kv.layers,
                    frequency_scores(kv.layers).cpu(),
                    namespace=self._namespace,
                    token_ids=chunk.ids,
                    text=chunk.text,
                )
                for chunk, kv in zip(batch, captured, strict=True)
            ]

    def _write(self, encoded: list[StoredChunk]) -> int:
        total = 0
        for chunk in encoded:
            total += self._store.write(chunk)
            if chunk.head.text is not None:
                self._stored(chunk.key, chunk.head.text)
        return total
