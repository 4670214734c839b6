"""Rows of chunks that are not in memory: read on threads, ahead of the layer that computes, each layer of each chunk once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from cachetune_rag.concurrency.deadline import DeadlinePool, StoreTimeoutError
from cachetune_rag.concurrency.workers import Job
from cachetune_rag.reuse.source import Source
from cachetune_store import ChunkKey, ChunkReader, DamagedChunkError

READ_AHEAD = 4
"""Layers that are read ahead of the one that computes, while it is not known yet which rows later layers need."""
FINAL_READ_AHEAD = 16
"""Layers that are read ahead once the needed rows are known. Many, so that neither the disk nor the model waits for the other."""


class DamagedSourceError(Exception):
    """Rows of a chunk failed their check; `key` names the chunk."""

    def __init__(self, key: ChunkKey):
        super().__init__(str(key))
        self.key = key


CANT_READ = (DamagedSourceError, StoreTimeoutError)
"""What may happen while stored rows are read: the request starts over without them."""


class SlowRows:
    """Reads the rows, and the deviations, of a prompt's chunks that are not in memory.

    Args:
        pool: threads that read.
        layers: how many layers the model has.
    """

    def __init__(self, pool: DeadlinePool, layers: int):
        self._pool, self._layers = pool, range(layers)
        self._sources: list[Source] = []
        self._unread = [
            False
        ] * layers  # by layer, whether some of its rows are not read yet: some may have been, ahead of the request
        self._ahead: dict[int, list[Job[Tensor]]] = {}
        self._taken: set[int] = set()
        self._deviations: dict[ChunkKey, Job[Tensor | None]] = {}
        self._horizon = READ_AHEAD
        self._when_read: Callable[[], None] | None = None

    def __bool__(self) -> bool:
        return bool(self._sources)

    def set_sources(self, sources: Sequence[Source]) -> None:
        """The chunks that are not in memory, and how many rows of each are read of the layers that are still to come."""
        self.drain()
        self._sources = list(sources)
        self._unread = [not all(s.reader.has(layer, s.rows) for s in self._sources) for layer in self._layers]

    def ready(self, layer: int) -> bool:
        """Whether the rows of `layer` can be had without waiting."""
        if not self._unread[layer]:
            return True
        jobs = self._ahead.get(layer)
        return jobs is not None and all(job.done() for job in jobs)

    def take(self, layer: int) -> list[Tensor]:
        """The encoded rows of every source; waits for them. Of later layers, reading begins.

        Raises:
            DamagedSourceError, StoreTimeoutError: they can't be read.
        """
        self.read_on(layer)
        if self._sources and self._unread[layer]:
            rows = self._results(self._ahead[layer])
            del self._ahead[layer]
        else:
            rows = [read_rows(source, layer) for source in self._sources]
        self._taken.add(layer)
        return rows

    def read_on(self, layer: int) -> None:
        """Start reading the rows of `layer` and of the next layers; layers that are there already are not counted."""
        if not self._sources:
            return
        unread = [number for number in self._layers[layer:] if self._unread[number]]
        for ahead in unread[: 1 + self._horizon]:
            if ahead not in self._ahead and ahead not in self._taken:
                self._ahead[ahead] = [self._pool.submit(read_rows, s, ahead) for s in self._sources]
        if self._when_read is not None and self._all_asked():
            self._tell_when_read()

    def settle(self) -> None:
        """Wait until all rows and the deviations that were asked for are read.

        Raises:
            DamagedSourceError, StoreTimeoutError: they can't be read.
        """
        self._horizon = len(self._layers)
        self.read_on(0)
        if self._sources:
            for jobs in self._ahead.values():
                self._results(jobs)
            for key in self._deviations:
                self._pool.result(self._deviations[key])

    def sources_are_final(self, when_read: Callable[[], None]) -> None:
        """See `LayerLoader.sources_are_final`."""
        self._horizon, self._when_read = max(self._horizon, FINAL_READ_AHEAD), when_read
        if self._all_asked():
            self._tell_when_read()

    def start_deviations(self) -> None:
        """Start reading the deviations of all sources."""
        for source in self._sources:
            if source.reader.deviations_wait:
                self._start_deviations(source.reader)

    def deviations(self, reader: ChunkReader) -> Tensor | None:
        """The deviations of a chunk; waits for them if they are not in memory.

        Raises:
            DamagedSourceError, StoreTimeoutError: they can't be read.
        """
        if not reader.deviations_wait:
            return reader.deviations
        return self._pool.result(self._start_deviations(reader))

    def drain(self) -> None:
        """Wait for reads of rows under way and drop them, so that the readers may be closed. Overdue reads are left to end by themselves."""
        for jobs in self._ahead.values():
            for job in jobs:
                self._pool.wait_or_leave(job)
            jobs.clear()
        self._ahead.clear()

    def close(self) -> None:
        """When this returns, nothing is read any more."""
        self.drain()
        for job in self._deviations.values():
            self._pool.wait_or_leave(job)
        self._deviations.clear()

    def _results(self, jobs: list[Job[Tensor]]) -> list[Tensor]:
        """What jobs give. No frame keeps one of them: the error of a job refers to all frames that it comes through, and these refer to the prompt's
        buffers. `drain` empties the list, so nothing of a request that failed has to wait for Python's collector."""
        rows: list[Tensor] = []
        while len(rows) < len(jobs):
            rows.append(self._pool.result(jobs[len(rows)]))
        return rows

    def _start_deviations(self, reader: ChunkReader) -> Job[Tensor | None]:
        job = self._deviations.get(reader.key)
        if job is None:
            job = self._deviations[reader.key] = self._pool.submit(_read_deviations, reader)
        return job

    def _tell_when_read(self) -> None:
        """Call `when_read` now, or at the end of the last read if that is still under way."""
        call, self._when_read = self._when_read, None
        assert call is not None
        under_way = self._ahead.get(max(self._ahead, default=-1))
        if not under_way:
            call()
        else:
            under_way[-1].add_done_callback(lambda job: None if job.cancelled() else call())

    def _all_asked(self) -> bool:
        return all(layer in self._taken or layer in self._ahead or not self._unread[layer] for layer in self._layers)


def read_rows(source: Source, layer: int) -> Tensor:
    """The encoded rows of a layer of a chunk that are needed.

    Raises:
        DamagedSourceError: they fail their check.
    """
    try:
        return source.reader.read(layer, source.rows)
    except DamagedChunkError as error:
        raise DamagedSourceError(source.reader.key) from error


def _read_deviations(reader: ChunkReader) -> Tensor | None:
    try:
        return reader.deviations
    except DamagedChunkError as error:
        raise DamagedSourceError(reader.key) from error
