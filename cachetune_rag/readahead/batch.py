"""The chunks of one prompt that are read ahead, and the order of their reads."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass

from cachetune_rag.checking.arguments import check_wait
from cachetune_rag.concurrency.forks import this_process
from cachetune_rag.concurrency.workers import Job
from cachetune_store import ChunkKey, ChunkReader


class Prefetch:
    """Reads the chunks of one prompt into host memory, in the background.

    It ends by itself: when the chunks are there, when there is no more room, or when a request begins that needs them.
    """

    def __init__(self) -> None:
        self._origin = this_process()
        self.stop = threading.Event()
        self.futures: list[Job[int]] = []
        """Its work on threads. Work that starts further work adds it here before it ends."""

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it has ended, at most `timeout` seconds. Gives whether it has ended."""
        check_wait(timeout)
        end = None if timeout is None else time.monotonic() + timeout
        # More may be added meanwhile.
        for future in self.futures:
            try:
                future.exception(None if end is None else max(0.0, end - time.monotonic()))
            except TimeoutError:
                return False
            except CancelledError:
                pass
        return True

    def cancel(self) -> None:
        """Read nothing more. Chunks that are partly read are dropped."""
        if not self._origin.here:
            return
        self.stop.set()
        for future in list(self.futures):
            future.cancel()

    @property
    def bytes(self) -> int:
        """Bytes of host memory that were filled so far."""
        done = [f for f in list(self.futures) if f.done() and not f.cancelled()]
        return sum(f.result() for f in done if f.exception() is None)


@dataclass(eq=False)
class ChunkBeingRead:
    """A chunk that is being read.

    Attributes:
        reader: open. The thread that sets `gone` closes it or hands it on.
        rows: how many rows of each layer are wanted first.
        left: reads that are still to be done.
        reading: reads under way.
        failed: a read went wrong.
        gone: a request has taken the reader, or it is closed.
    """

    reader: ChunkReader
    rows: int
    left: int
    reading: int = 0
    failed: bool = False
    gone: bool = False


class Batch:
    """The chunks of one prefetch."""

    def __init__(self, limit: int):
        self.prefetch, self.room = Prefetch(), limit
        self.reserved = 0  # bytes of its chunks that nobody else may read ahead
        self.unopened: dict[ChunkKey, int] = {}  # sizes of chunks that are to be opened later
        self.keys: Iterator[tuple[int, ChunkKey]] = iter(())
        self.found: dict[int, int | ChunkReader] = {}  # the size of a chunk in host memory, or an open chunk
        self.chunks: list[ChunkBeingRead] = []
        self.order: Iterator[tuple[ChunkBeingRead, int, int]] = iter(())

    def take_room(self, size: int) -> bool:
        """Reserve room for a chunk. Once a chunk does not fit, no later one gets room either: earlier ones are wanted sooner."""
        fits = size <= self.room
        self.room = self.room - size if fits else 0
        return fits

    def reads(self) -> Iterator[tuple[ChunkBeingRead, int, int]]:
        """Chunk, layer and rows of every read: first the rows of all layers that are wanted first, then the rest."""
        layers = max((len(c.reader.layout.layers) for c in self.chunks), default=0)
        for whole in (False, True):
            for layer in range(layers):
                for chunk in self.chunks:
                    tokens = chunk.reader.layout.tokens
                    if not whole or chunk.rows < tokens:
                        yield chunk, layer, tokens if whole else chunk.rows
