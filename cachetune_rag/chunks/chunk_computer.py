"""Runs chunks through the model alone, ranks their tokens, and stores them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from cachetune_rag.checking.arguments import check_count
from cachetune_rag.chunks.lead_in_choice import LeadIn, lead_ins_for
from cachetune_rag.chunks.lead_ins import LeadIns
from cachetune_rag.chunks.mean_capture import MeanCapture
from cachetune_rag.chunks.owners import ChunkToStore, Owners
from cachetune_rag.concurrency.deadline import Call, call_directly
from cachetune_rag.concurrency.model_lock import ModelLock
from cachetune_rag.errors import ModelChangedError
from cachetune_rag.model import ModelAdapter
from cachetune_rag.model.libraries.neutral import neutral
from cachetune_rag.selection.frequency import frequency_scores
from cachetune_store import Chunk as EncodedChunk
from cachetune_store import ChunkKey, ChunkStore, Namespace, make_key


@dataclass(frozen=True)
class ChunkToCompute:
    """A chunk under the key that it will be stored with."""

    key: ChunkKey
    ids: tuple[int, ...]
    text: str


@dataclass(frozen=True)
class Batch:
    """Chunks that are run together, behind the same lead-ins."""

    lead_ins: tuple[LeadIn, ...]
    chunks: list[ChunkToCompute]


@dataclass(frozen=True)
class ComputeJob:
    """What stays the same while chunks are computed.

    Attributes:
        namespace: what their keys are made with.
        capture: runs them, and keeps the KV of the lead-ins.
        turn: entered for every use of the model, in the background; None: requests wait for the job, as they do for each other.
    """

    namespace: Namespace
    capture: MeanCapture
    turn: AbstractContextManager[Any] | None = None


class ChunkComputer:
    """Computes and stores chunks. Memory holds one batch on its way to the store, however many chunks there are.

    Args:
        adapter: the model.
        store: where chunks are kept.
        lead_ins: say what stands before the chunks while they are computed.
        lock: the model's.
        batch_tokens: most tokens that are run together; 0: one chunk at a time.
        stored: told the key and the text of each chunk that was written.
        check: refuses a model whose weights are not those of the given fingerprint.

    Raises:
        ConfigError: batch_tokens is no count.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        store: ChunkStore,
        lead_ins: LeadIns,
        lock: ModelLock,
        batch_tokens: int,
        stored: Callable[[ChunkKey, str], None],
        check: Callable[[str], None],
    ):
        check_count(batch_tokens, "batch_tokens", "an int, 0 for one chunk at a time", least=0)
        self._adapter, self._store, self._lead_ins, self._lock = adapter, store, lead_ins, lock
        self._batch_tokens, self._stored, self._check = batch_tokens, stored, check
        self._last: ComputeJob | None = None

    def job(self, namespace: Namespace) -> ComputeJob:
        """A job for chunks of a namespace: the last one, if it was for the same, since it has run the lead-ins already."""
        if self._last is None or self._last.namespace != namespace:
            self._last = ComputeJob(namespace, MeanCapture(self._adapter, self._lock))
        return self._last

    def forget(self) -> None:
        """Drop the KV of lead-ins, because the model's weights have changed."""
        self._last = None

    def missing(self, chunks: Iterable[ChunkToCompute]) -> list[ChunkToCompute]:
        """Those of the chunks that are not stored."""
        return [chunk for chunk in chunks if not self._store.contains(chunk.key, lasting=True)]

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

        A chunk is added to its documents before it is stored, so that it always belongs to one. If all of its documents were removed or
        replaced since a request named them, it is left out; if that happens while it is written, it is deleted again.

        Args:
            chunks: what to store.
            call: makes the calls that may touch the store's disk.
            kept: told the key of each chunk that is stored.
            withdrawn: told the key of each chunk that is not wanted any more.
            turn: entered for every use of the model; it has to take the model's lock. Chunks are then run one at a time, so that no
                use takes long. None: the lock is taken as a request takes it.
        """
        given = list(chunks)
        tenant = self._lead_ins.known_namespace.tenant
        owners = Owners(self._store, tenant, call)
        # Lazily, so that it is asked under the lead-ins' lock: no text of a document that was removed before goes into them.
        texts = (chunk.ids for chunk in given if owners.may_want(chunk))
        namespace = call(self._lead_ins.choose_from, texts, indexing=False)
        job = replace(self.job(namespace), turn=turn)
        sources = {make_key(job.namespace, chunk.ids): chunk for chunk in given}
        wanted = {key: ChunkToCompute(key, chunk.ids, chunk.text) for key, chunk in sources.items()}
        for key in [key for key, chunk in sources.items() if not owners.want(key, chunk, self._keys)]:
            del wanted[key]
            withdrawn(key)
        # Of a chunk that was found by its token ids, only the store may know the text; without one it could never be found again.
        for key in [key for key, chunk in wanted.items() if not chunk.text]:
            text = call(self._known_text, wanted[key].ids)
            if text is None:
                del wanted[key]
                withdrawn(key)
            else:
                wanted[key] = replace(wanted[key], text=text)

        stored = 0
        with call(self._store.claim, wanted) as claim:
            new = call(self.missing, [wanted[key] for key in claim.keys])
            # The others were stored meanwhile, or another thread or process is computing them now.
            for key in wanted.keys() - {chunk.key for chunk in new}:
                (kept if owners.take(key, sources[key]) else withdrawn)(key)
            for batch in self.batches(job, new):
                for encoded in self.compute(job, batch):
                    key, chunk = encoded.key, sources[encoded.key]
                    taken = owners.take(key, chunk)
                    if taken:
                        stored += call(self.write, [encoded])
                        taken = owners.keep(key, chunk)
                    (kept if taken else withdrawn)(key)
        return stored

    def batches(self, job: ComputeJob, chunks: Sequence[ChunkToCompute]) -> Iterator[Batch]:
        """The chunks in batches. Those of a batch have about the same length, so that little is padded."""
        behind = [(lead_ins_for(chunk.ids, job.namespace, self._adapter.max_positions), chunk) for chunk in chunks]
        most = self._batch_tokens if job.turn is None else 0
        if most:
            behind.sort(key=lambda pair: (pair[0], len(pair[1].ids)))
        batch: Batch | None = None
        for lead_ins, chunk in behind:
            if batch is not None:
                run = MeanCapture.tokens_run(len(chunk.ids), lead_ins) * (len(batch.chunks) + 1)
                if run <= most and lead_ins == batch.lead_ins:
                    batch.chunks.append(chunk)
                    continue
                yield batch
            batch = Batch(lead_ins, [chunk])
        if batch is not None:
            yield batch

    def compute(self, job: ComputeJob, batch: Batch) -> list[EncodedChunk]:
        """Capture, rank and encode a batch, all on the caller's thread: a second thread with torch work would only compete for the cores."""
        lock: AbstractContextManager[Any] = self._lock if job.turn is None else job.turn
        with self._lock.reserved() if job.turn is None else nullcontext(), neutral():
            try:
                with lock:
                    self._check(job.namespace.model)
                captured = job.capture.capture([c.ids for c in batch.chunks], batch.lead_ins, job.turn)
                with lock:
                    # Changes made meanwhile are noticed now: no KV of other weights is stored under this namespace's keys.
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

    def write(self, encoded: Sequence[EncodedChunk]) -> int:
        """Write encoded chunks. Returns the bytes stored."""
        total = 0
        for chunk in encoded:
            total += self._store.write(chunk)
            if chunk.head.text is not None:
                self._stored(chunk.key, chunk.head.text)
        return total

    def _known_text(self, ids: Sequence[int]) -> str | None:
        """The text that the store has of a chunk, which may have had to make room since or was computed behind other lead-ins."""
        return next((text for _, text, _ in self._store.texts(keys=self._keys(ids))), None)

    def _keys(self, ids: Sequence[int]) -> list[ChunkKey]:
        """A chunk's keys in the namespaces whose texts are recognised."""
        return [make_key(namespace, ids) for namespace in self._lead_ins.namespaces]
