"""The precompute job: stores all chunks of documents, and registers the documents."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from cachetune_rag.checking.arguments import check_callback, check_flag, is_iterable
from cachetune_rag.chunks.chunk_computer import ChunkComputer, ChunkToCompute, ComputeJob
from cachetune_rag.chunks.lead_in_choice import MOST_TOKENS, least_tokens
from cachetune_rag.chunks.lead_ins import LeadIns
from cachetune_rag.concurrency.workers import Job, Workers
from cachetune_rag.errors import ConfigError, PromptTooLongError
from cachetune_rag.report import PrecomputeSummary
from cachetune_rag.text.documents import Document
from cachetune_store import ChunkKey, ChunkStore, make_key
from cachetune_store.printing import shown

CLAIM_PATIENCE = 60.0
"""Seconds that a job waits for chunks that another one is computing, while none of them is stored."""
STOPPED_PATIENCE = 10.0
"""The same where all processes that compute them are stopped (Ctrl-Z, a debugger)."""
_CLAIM_INTERVAL = 0.02
_TELL_SOON, _TELL_AGAIN = 1.0, 30.0
"""Seconds after which the log says that chunks are waited for, and says it again."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """How far a precompute job is. The job's callback gets one after every batch and every document.

    Attributes:
        document: id of the document that is being stored.
        documents: documents finished.
        chunks, skipped: chunks that were computed, and chunks that were stored before.
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


class _Count:
    """What a job has done so far, and the callback that is told of it."""

    def __init__(self, progress: Callable[[Progress], None] | None, telling: threading.local):
        self._progress, self._telling = progress, telling
        self._started = time.perf_counter()
        self.documents = self.chunks = self.skipped = self.tokens = self.bytes = 0

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._started

    def tell(self, document: Document) -> None:
        if self._progress is None:
            return
        so_far = self.documents, self.chunks, self.skipped, self.tokens, self.bytes
        self._telling.active = True
        try:
            self._progress(Progress(document.id, *so_far, self.seconds))
        finally:
            self._telling.active = False


class Precomputer:
    """Stores documents.

    Args:
        computer: computes and stores their chunks.
        store: where chunks and documents are kept.
        lead_ins: may be chosen from the documents' texts.
        encode: turns a text into token ids.
        limit: most tokens that the model reads; None: any number.
    """

    def __init__(
        self,
        computer: ChunkComputer,
        store: ChunkStore,
        lead_ins: LeadIns,
        encode: Callable[[str], Sequence[int]],
        limit: int | None,
    ):
        self._computer, self._store, self._lead_ins = computer, store, lead_ins
        self._encode, self._limit = encode, limit
        self._telling = threading.local()

    def precompute(
        self,
        documents: Iterable[Document | str],
        progress: Callable[[Progress], None] | None,
        *,
        replace_documents: bool = True,
    ) -> PrecomputeSummary:
        """Store documents. Each is registered when all its chunks are stored, so a job that is interrupted resumes there.

        Args:
            documents: what to store.
            progress: told how far the job is.
            replace_documents: False: a document whose id is known keeps the chunks that it holds, and gets these as well.
        """
        check_flag(replace_documents, "replace")
        check_callback(progress, "progress")
        if isinstance(documents, Mapping | bytes | bytearray | memoryview | range) or not is_iterable(documents):
            raise ConfigError(
                f"documents is a {type(documents).__name__}: use a list of Documents or strings, or one of them."
            )
        if getattr(self._telling, "active", False):
            # It would wait for chunks that it is computing itself.
            raise ConfigError(
                "precompute was called by the progress callback of another precompute: let that one return first, and precompute "
                "behind it."
            )
        self._store.check_writable()  # before anything is computed
        count = _Count(progress, self._telling)
        given = self.choose_lead_ins(map(Document.of, documents))
        job = self._computer.job(self._lead_ins.namespace)
        # One writer: the next batch is computed while the last one is written and synced.
        with Workers(1, "cachetune-write") as writer:
            for document in given:
                keys = self._store_chunks(job, document, writer, count)
                register = self._store.set_document if replace_documents else self._store.extend_document
                register(document.id, keys, tenant=job.namespace.tenant)
                count.documents += 1
                count.tell(document)
        lead_ins = len(job.namespace.lead_ins)
        return PrecomputeSummary(
            count.documents, count.chunks, count.skipped, count.tokens, count.bytes, count.seconds, lead_ins
        )

    def _store_chunks(self, job: ComputeJob, document: Document, writer: Workers, count: _Count) -> list[ChunkKey]:
        """Compute and store the chunks of a document that are not stored. Returns the keys of all its chunks."""
        named = [chunk for chunk in (self._chunk(job, document, text) for text in document.chunks) if chunk.ids]
        before = count.chunks
        for new in self._turns({chunk.key: chunk for chunk in named}):
            # At most one. Taken out before it is waited for, since the error of a job refers to this frame.
            pending: list[Job[int]] = []
            for batch in self._computer.batches(job, new):
                # Since the chunks were claimed, another process may have written some from its memory.
                batch.chunks[:] = self._computer.missing(batch.chunks)
                if not batch.chunks:
                    continue
                encoded = self._computer.compute(job, batch)
                if pending:
                    count.bytes += pending.pop().result()
                pending.append(writer.submit(self._computer.write, encoded))
                count.chunks += len(batch.chunks)
                count.tokens += sum(len(chunk.ids) for chunk in batch.chunks)
                count.tell(document)
            if pending:
                count.bytes += pending.pop().result()
        count.skipped += len(named) - (count.chunks - before)
        return [chunk.key for chunk in named]

    def choose_lead_ins(self, documents: Iterator[Document]) -> Iterator[Document]:
        """Choose lead-ins from the first documents, if none are chosen yet. Returns all of the documents, to be stored."""
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
        except Exception as error:  # raised when its turn comes: the documents before it are stored first
            failure = error
        self._lead_ins.choose_from(texts, indexing=True)
        return _resumed(held, failure, documents)

    def _chunk(self, job: ComputeJob, document: Document, text: str) -> ChunkToCompute:
        ids = tuple(self._encode(text))
        if self._limit is not None and len(ids) + least_tokens(job.namespace) > self._limit:
            raise PromptTooLongError(
                f"document {shown(document.id)} has a chunk of {len(ids)} tokens; the model reads at most {self._limit}. "
                "Split it into smaller chunks (512 tokens is a good size)."
            )
        return ChunkToCompute(make_key(job.namespace, ids), ids, text)

    def _turns(self, chunks: dict[ChunkKey, ChunkToCompute]) -> Iterator[list[ChunkToCompute]]:
        """The chunks that are to be computed here: in one turn, unless another thread or process is just computing some.

        Those are waited for, and come in a later turn if they were not stored then. If none of them is stored or becomes free for too
        long, as when the other process was stopped, all that are left are computed here.
        """
        left = {chunk.key: chunk for chunk in self._computer.missing(chunks.values())}
        wait = _WaitForOthers(self._store)
        while left:
            before = len(left)
            with self._store.claim(left) as claim:
                if claim.own:
                    raise ConfigError(
                        f"precompute() was called for {len(claim.own)} chunks that the same thread is just computing, from the "
                        "progress callback or the documents of that call: it would wait for itself. Call it when the other has returned."
                    )
                # A chunk may have been stored between the last look and the claim.
                if new := self._computer.missing(left[key] for key in left if key in claim.keys):
                    yield new
            left = {chunk.key: chunk for chunk in self._computer.missing(left.values()) if chunk.key not in claim.keys}
            if len(left) < before:
                wait = _WaitForOthers(self._store)
            elif not wait.again(left):
                yield list(left.values())
                return


class _WaitForOthers:
    """Waiting for chunks that others have claimed. The log says so, and the waiting ends at some time."""

    def __init__(self, store: ChunkStore):
        self._store = store
        self._since = time.monotonic()
        self._look = self._tell = self._since + min(_TELL_SOON, STOPPED_PATIENCE, CLAIM_PATIENCE)

    def again(self, keys: Collection[ChunkKey]) -> bool:
        """Wait a moment before the next look at these chunks. Returns False if it has taken too long."""
        now = time.monotonic()
        if now >= self._look:
            holders = self._store.claimants(keys)
            all_stopped = bool(holders.pids) and holders.pids == holders.stopped
            if now >= self._tell:
                level = logging.WARNING if all_stopped else logging.INFO
                _log.log(level, "waiting for %d chunks, which are being computed by %s", len(keys), holders)
                self._tell = now + _TELL_AGAIN
            waited = now - self._since
            if waited >= (STOPPED_PATIENCE if all_stopped else CLAIM_PATIENCE):
                _log.warning(
                    "%d chunks are computed here: for %.0f s, none of them was stored by %s", len(keys), waited, holders
                )
                return False
            self._look = now + min(_TELL_SOON, STOPPED_PATIENCE, CLAIM_PATIENCE)
        time.sleep(_CLAIM_INTERVAL)
        return True


def _resumed(held: deque[Document], failure: Exception | None, rest: Iterator[Document]) -> Iterator[Document]:
    while held:
        yield held.popleft()
    if failure is not None:
        raise failure
    yield from rest
