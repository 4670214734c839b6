"""A run of `cachetune precompute` on this machine: a corpus goes through the engine, and a meter shows how far it is."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

from cachetune_rag.cli.console import number, size
from cachetune_rag.cli.meter import ESTIMATE_SECONDS, Meter
from cachetune_rag.text.files.corpus import Corpus, CorpusError
from cachetune_rag.text.splitting import Splitter

if TYPE_CHECKING:
    from cachetune_rag.chunks.precompute import Progress
    from cachetune_rag.engine import CacheTune
    from cachetune_rag.report import PrecomputeSummary
    from cachetune_rag.text.documents import Document


class CorpusProgress:
    """The share of a corpus that is done, counted in bytes. Inside a document it is estimated from its chunks.

    Args:
        total: bytes of the corpus.
    """

    def __init__(self, total: int):
        self.total = max(total, 1)
        self._read = self._finished = 0  # bytes and number of finished documents
        # Bytes and chunks of documents that the job has read and not finished.
        self._unfinished: deque[tuple[int, int]] = deque()
        self._chunks_before = 0  # chunks that were done before the current document
        self._read_inside = 0.0  # bytes of the current document that are done
        self._samples: deque[tuple[float, int]] = deque([(0.0, 0)])

    @property
    def done(self) -> float:
        """Bytes that are done."""
        return min(self.total, self._read + self._read_inside)

    def begin(self, size: int, chunks: int) -> None:
        """Add a document that the job was given. The job handles documents in this order."""
        self._unfinished.append((size, chunks))

    def skip(self, size: int) -> None:
        """Count bytes that need no work."""
        self._read += size

    def update(self, progress: Progress) -> None:
        """Update the share from the job's progress."""
        done = progress.chunks + progress.skipped
        while self._finished < progress.documents:
            self._finished += 1
            self._chunks_before = done
            self.skip(self._unfinished.popleft()[0])
        bytes_, chunks = self._unfinished[0] if self._unfinished else (0, 1)
        self._read_inside = bytes_ * min(1.0, (done - self._chunks_before) / max(chunks, 1))

    def rate(self, progress: Progress) -> float:
        """Tokens a second over the last half minute."""
        self._samples.append((progress.seconds, progress.tokens))
        while len(self._samples) > 2 and self._samples[0][0] < progress.seconds - ESTIMATE_SECONDS:
            self._samples.popleft()
        (start, before), (end, after) = self._samples[0], self._samples[-1]
        return (after - before) / (end - start) if end > start else 0.0


class CorpusJob:
    """One run: gives documents to the engine when it asks for them, and keeps track of the progress.

    Args:
        corpus: the documents.
        engine: computes and stores them.
        splitter: cuts their texts into chunks.

    Attributes:
        progress: the share of the corpus that is done.
        empty, empty_names: how many documents had no text, and ids of some.
        interrupted: what ended the run before its end; None if nothing did.
    """

    def __init__(self, corpus: Corpus, engine: CacheTune, splitter: Splitter):
        self.progress = CorpusProgress(corpus.size)
        self._meter = Meter("Precomputing")
        self.empty = 0
        self.empty_names: list[str] = []
        self.interrupted: KeyboardInterrupt | None = None
        self._corpus, self._engine, self._splitter = corpus, engine, splitter
        self._last: Progress | None = None

    def run(self) -> PrecomputeSummary:
        """Precompute. Ctrl-C ends the run with a summary of what is stored, and an error in the corpus says how much is stored."""
        from cachetune_rag.report import PrecomputeSummary

        try:
            with self._meter:
                return self._engine.precompute(self._documents(), progress=self._progress)
        except KeyboardInterrupt as error:
            self.interrupted = error.with_traceback(None)
            at = self._last
            if at is None:
                return PrecomputeSummary(0, 0, 0, 0, 0, 0.0)
            lead_ins = len(self._engine.namespace.lead_ins)
            return PrecomputeSummary(at.documents, at.chunks, at.skipped, at.tokens, at.bytes, at.seconds, lead_ins)
        except CorpusError as error:
            done = 0 if self._last is None else self._last.documents
            kept = f"{number(done, 'document')} before it {'is' if done == 1 else 'are'} stored"
            raise CorpusError(f"{error}\n{kept}; correct it and run the same command again.") from error

    def _documents(self) -> Iterator[Document]:
        from cachetune_rag.text.documents import Document

        for source in self._corpus.documents(self.progress.skip):
            if source.empty:
                self.empty += 1
                if len(self.empty_names) < 3:
                    self.empty_names.append(source.id)
                self.progress.skip(source.size)
                continue
            chunks = source.cut(self._splitter.split)
            self.progress.begin(source.size, len(chunks))
            yield Document(source.id, chunks)

    def _progress(self, progress: Progress) -> None:
        self._last = progress
        self.progress.update(progress)
        rate, stored = f"{self.progress.rate(progress):,.0f}", size(progress.bytes)
        self._meter.update(
            f"{number(progress.documents, 'doc')} · {rate} tok/s · {stored}",
            self.progress.done,
            self.progress.total,
            line=f"{number(progress.documents, 'document')}, {rate} tokens/s, {stored} stored",
        )
