"""The precompute job: run chunks through the model alone, rank their tokens, store them."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from cachetune_rag.checking.arguments import check_callback, check_count, check_flag, is_iterable
from cachetune_rag.chunks.lead_ins import MOST_TOKENS, Lead, LeadIns
from cachetune_rag.chunks.mean_capture import MeanCapture
from cachetune_rag.chunks.owners import ChunkToStore, Owners
from cachetune_rag.concurrency.deadline import Call, call_directly
from cachetune_rag.concurrency.model_lock import ModelLock
from cachetune_rag.concurrency.workers import Job, Workers
from cachetune_rag.errors import ConfigError, ModelChangedError, PromptTooLongError
from cachetune_rag.model import ModelAdapter
from cachetune_rag.model.libraries.neutral import neutral
from cachetune_rag.report import PrecomputeSummary
from cachetune_rag.selection.frequency import frequency_scores
from cachetune_rag.text.documents import Document
from cachetune_store import Chunk as StoredChunk
from cachetune_store import ChunkKey, ChunkStore, Namespace, make_key
from cachetune_store.printing import shown

PATIENCE = 60.0
"""Seconds that a job waits for chunks that another one is computing."""
_LOOK_AGAIN = 0.02


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


@dataclass(frozen=True)
class _Batch:
    """Chunks that are run together, behind the same lead-ins."""

    lead_ins: tuple[Lead, ...]
    chunks: list[_Chunk]


@dataclass(frozen=True)
class _Job:
    """What stays the same while a job runs, and the KV of its lead-ins.

    Attributes:
        turn: entered to use the model, in the background; None: a job that requests wait for, as they do for each other.
    """

    namespace: Namespace
    capture: MeanCapture
    turn: AbstractContextManager[Any] | None = None


class Precomputer:
    """Computes and stores chunks. Memory holds one batch on its way to the store, however large the corpus is."""

    def __init__(
        self,
        adapter: ModelAdapter,
        store: ChunkStore,
        lead_ins: LeadIns,
        encode: Callable[[str], Sequence[int]],
        lock: ModelLock,
        batch_tokens: int,
        stored: Callable[[ChunkKey, str], None],
        check: Callable[[str], None] = lambda _: None,
    ):
        check_count(batch_tokens, "batch_tokens", "an int, 0 for one chunk at a time", least=0)
        self._adapter, self._store, self._lead_ins = adapter, store, lead_ins
        self._encode, self._lock, self._batch_tokens, self._stored = encode, lock, batch_tokens, stored
        self._check = check
        self._last: _Job | None = None
        self._telling = threading.local()

    def store_chunks(
        self,
        chunks: Iterable[ChunkToStore],
        *,
        call: Call = call_directly,
        kept: Callable[[ChunkKey], None] = lambda _: None,
        withdrawn: Callable[[ChunkKey], None] = lambda _: None,
        turn: AbstractContextManager[Any] | None = None,
    ) -> int:
        """Compute and store chunks. Returns the bytes stored.

        A chunk of documents is added to them first, so that at no time it is stored and belongs to none. One whose documents were
        all removed or replaced since they were named is left out, or deleted again where that happens while it is written.

        Args:
            chunks: what to store.
            call: makes the calls that may touch the store's disk.
            kept: told the key of each chunk that is stored.
            withdrawn: told the key of each chunk that is not wanted any more.
            turn: entered for every use of the model; it has to hold the model's lock. Chunks are then run one at a time, so that
                none of them takes long. None: the lock is taken as a request does.
        """
        given = list(chunks)
        tenant = self._lead_ins.last_known.tenant
        owners = Owners(self._store, tenant, call)
        # Looked at under the lead-ins' lock: nothing of a document that was removed before goes into them.
        texts = (chunk.ids for chunk in given if owners.may_want(chunk))
        namespace = call(self._lead_ins.offer, texts, indexing=False)
        job = replace(self._job(namespace), turn=turn)
        sources = {make_key(job.namespace, chunk.ids): chunk for chunk in given}
        wanted = {key: _Chunk(key, chunk.ids, chunk.text) for key, chunk in sources.items()}
        for key in [key for key, chunk in sources.items() if not owners.want(key, chunk, self._keys)]:
            del wanted[key]
            withdrawn(key)

        stored = 0
        with call(self._store.claim, wanted) as claim:
            new = call(self._missing, [wanted[key] for key in claim.keys])
            # The others were stored meanwhile, or another thread or process is computing them.
            for key in wanted.keys() - {chunk.key for chunk in new}:
                (kept if owners.take(key, sources[key]) else withdrawn)(key)
            for batch in self._batches(job, new):
                for encoded in self._compute(job, batch):
                    key, chunk = encoded.key, sources[encoded.key]
                    taken = owners.take(key, chunk)
                    if taken:
                        stored += call(self._write, [encoded])
                        taken = owners.keep(key, chunk)
                    (kept if taken else withdrawn)(key)
        return stored

    def _keys(self, ids: Sequence[int]) -> list[ChunkKey]:
        """A chunk's keys in the namespaces whose texts are recognised."""
        return [make_key(namespace, ids) for namespace in self._lead_ins.namespaces]

    def run(
        self,
        documents: Iterable[Document | str],
        progress: Callable[[Progress], None] | None,
        *,
        replace_documents: bool = True,
    ) -> PrecomputeSummary:
        """The job. A document is registered when all its chunks are stored, so a run that is cut off resumes there.

        Args:
            documents: what to store.
            progress: told how far it is.
            replace_documents: False: a document of an id that is known keeps the chunks that it holds, and gets these as well.
        """
        check_flag(replace_documents, "replace")
        check_callback(progress, "progress")
        if isinstance(documents, Mapping | bytes | bytearray | memoryview | range) or not is_iterable(documents):
            raise ConfigError(
                f"documents is a {type(documents).__name__}: use a list of Documents or strings, or one of them."
            )
        if progress is not None and not callable(progress):
            raise ConfigError(f"progress is {shown(progress)}: use a function that takes a Progress, or None.")
        if getattr(self._telling, "active", False):
            # It would wait for chunks that are being computed, by itself.
            raise ConfigError(
                "precompute was called by the progress callback of another precompute: let that one return first, and precompute "
                "behind it."
            )
        self._store.check_writable()  # before anything is computed
        started = time.perf_counter()
        count = chunks = skipped = tokens = stored = 0

        def tell(document: Document) -> None:
            if progress is None:
                return
            self._telling.active = True
            try:
                progress(Progress(document.id, count, chunks, skipped, tokens, stored, time.perf_counter() - started))
            finally:
                self._telling.active = False

        given = self._look_ahead(map(Document.of, documents))
        job = self._job(self._lead_ins.namespace)
        # One writer: the next batch computes while the last one is written and synced.
        with Workers(1, "cachetune-write") as writer:
            for document in given:
                named = [c for c in (self._part(job, document, text) for text in document.chunks) if c.ids]
                before = chunks
                for new in self._turns({c.key: c for c in named}):
                    pending: Job[int] | None = None
                    for batch in self._batches(job, new):
                        # Since the chunks were claimed, one may have come down from another process's memory.
                        batch.chunks[:] = self._missing(batch.chunks)
                        if not batch.chunks:
                            continue
                        encoded = self._compute(job, batch)
                        if pending is not None:
                            stored += pending.result()
                        pending = writer.submit(self._write, encoded)
                        chunks += len(batch.chunks)
                        tokens += sum(len(c.ids) for c in batch.chunks)
                        tell(document)
                    if pending is not None:
                        stored += pending.result()
                skipped += len(named) - (chunks - before)
                register = self._store.set_document if replace_documents else self._store.extend_document
                register(document.id, [c.key for c in named], tenant=job.namespace.tenant)
                count += 1
                tell(document)
        took = time.perf_counter() - started
        return PrecomputeSummary(count, chunks, skipped, tokens, stored, took, len(job.namespace.lead_ins))

    def _look_ahead(self, documents: Iterator[Document]) -> Iterator[Document]:
        """The same documents. While lead-ins are to be chosen, the first ones are read now, to choose from them."""
        if not self._lead_ins.undecided:
            return documents
        held: deque[Document] = deque()
        texts: list[Sequence[int]] = []
        tokens, failure = 0, None
        try:
            for document in documents:
                held.append(document)
                encoded = [self._encode(text) for text in document.chunks]
                texts += encoded
                tokens += sum(map(len, encoded))
                if tokens >= MOST_TOKENS:
                    break
        except Exception as error:  # told when its turn comes: the documents before it are stored first
            failure = error
        self._lead_ins.offer(texts, indexing=True)
        return _resumed(held, failure, documents)

    def _job(self, namespace: Namespace) -> _Job:
        """The last one goes on if it can: it has run the lead-ins already, which a request's missed chunks shouldn't wait for."""
        if self._last is None or self._last.namespace != namespace:
            self._last = _Job(namespace, MeanCapture(self._adapter, self._lock))
        return self._last

    def forget(self) -> None:
        """Drop what is kept of the model's weights: lead-ins' KV."""
        self._last = None

    def _part(self, job: _Job, document: Document, text: str) -> _Chunk:
        chunk = self._chunk(job, tuple(self._encode(text)), text)
        limit = self._adapter.max_positions
        if limit is not None and len(chunk.ids) + self._lead_ins.least(job.namespace) > limit:
            raise PromptTooLongError(
                f"document {shown(document.id)} has a chunk of {len(chunk.ids)} tokens; the model reads at most {limit}. "
                "Split it into smaller chunks (512 tokens is a good size)."
            )
        return chunk

    def _chunk(self, job: _Job, ids: tuple[int, ...], text: str) -> _Chunk:
        return _Chunk(make_key(job.namespace, ids), ids, text)

    def _turns(self, chunks: dict[ChunkKey, _Chunk]) -> Iterator[list[_Chunk]]:
        """The chunks that are to be computed here: in one turn, unless another thread or process is just computing some.

        Those are waited for, and come in a later turn if they weren't stored then. A holder that makes no headway (one that
        was stopped, say) is waited for PATIENCE seconds.
        """
        left = {chunk.key: chunk for chunk in self._missing(chunks.values())}
        since = time.monotonic()
        while left:
            with self._store.claim(left) as claim:
                if claim.own:
                    raise ConfigError(
                        f"precompute() was called for {len(claim.own)} chunks that the same thread is just computing, from the "
                        "progress callback or the documents of that call: it would wait for itself. Call it when the other has returned."
                    )
                # Somebody may have stored one between the look and the claim.
                if new := self._missing(left[key] for key in left if key in claim.keys):
                    yield new
            if claim.keys:
                since = time.monotonic()
            elif time.monotonic() - since > PATIENCE:
                yield list(left.values())
                return
            else:
                time.sleep(_LOOK_AGAIN)
            left = {chunk.key: chunk for chunk in self._missing(left.values()) if chunk.key not in claim.keys}

    def _missing(self, chunks: Iterable[_Chunk]) -> list[_Chunk]:
        return [chunk for chunk in chunks if not self._store.contains(chunk.key, lasting=True)]

    def _batches(self, job: _Job, chunks: list[_Chunk]) -> Iterator[_Batch]:
        """Neighbours of about one length, so that little is padded."""
        behind = [(self._lead_ins.of(chunk.ids, job.namespace), chunk) for chunk in chunks]
        most = self._batch_tokens if job.turn is None else 0
        if most:
            behind.sort(key=lambda pair: (pair[0], len(pair[1].ids)))
        batch: _Batch | None = None
        for lead_ins, chunk in behind:
            if batch is not None:
                run = MeanCapture.tokens_run(len(chunk.ids), lead_ins) * (len(batch.chunks) + 1)
                if run <= most and lead_ins == batch.lead_ins:
                    batch.chunks.append(chunk)
                    continue
                yield batch
            batch = _Batch(lead_ins, [chunk])
        if batch is not None:
            yield batch

    def _compute(self, job: _Job, batch: _Batch) -> list[StoredChunk]:
        """Capture, rank and encode. All on the thread that computes: a second thread with torch work would only fight
        with this one for the cores.
        """
        lock: AbstractContextManager[Any] = self._lock if job.turn is None else job.turn
        with self._lock.reserved() if job.turn is None else nullcontext(), neutral():
            try:
                with lock:
                    self._check(job.namespace.model)
                captured = job.capture.capture([c.ids for c in batch.chunks], batch.lead_ins, job.turn)
                with lock:
                    # Whatever was changed since is noticed now: nothing of other weights gets under this namespace's keys.
                    self._check(job.namespace.model)
            except ModelChangedError:
                self.forget()
                raise
            with lock:
                return [
                    self._store.encode(
                        chunk.key,
                        kv.layers,
                        frequency_scores(kv.layers).cpu(),
                        namespace=job.namespace,
                        token_ids=chunk.ids,
                        text=chunk.text,
                        deviations=kv.deviations,
                    )
                    for chunk, kv in zip(batch.chunks, captured, strict=True)
                ]

    def _write(self, encoded: list[StoredChunk]) -> int:
        total = 0
        for chunk in encoded:
            total += self._store.write(chunk)
            if chunk.head.text is not None:
                self._stored(chunk.key, chunk.head.text)
        return total


def _resumed(held: deque[Document], failure: Exception | None, rest: Iterator[Document]) -> Iterator[Document]:
    while held:
        yield held.popleft()
    if failure is not None:
        raise failure
    yield from rest
