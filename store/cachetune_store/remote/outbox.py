"""What waits in a store's outbox: which of it can be told, and writing the chunks that have to be in the shared place before they are told of."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from ..errors import RemoteError
from ..index import Index
from ..keys import ChunkKey
from .book import Book
from .changes import Op
from .objects import Objects

__all__ = ["Uploads", "tellable"]

_UPLOAD_SECONDS = 1.0
"""Seconds after which writing chunks pauses, so that what needs no chunk is told meanwhile."""


class Uploads:
    """Writes chunks that wait in the outbox to the place. Safe to use from several threads: each chunk is written once.

    Args:
        objects: the place.
        index: the store's index.
        book: its records of the place.
        upload: writes a chunk to the place. Returns the op "chunk" of it; None if the chunk isn't here any more.
    """

    def __init__(self, objects: Objects, index: Index, book: Book, upload: Callable[[ChunkKey], Op | None]) -> None:
        self._objects, self._index, self._book, self._upload = objects, index, book, upload
        self._uploading = threading.Lock()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """No chunk is written while the context is open, by this process."""
        with self._uploading:
            yield

    def write_waiting(self) -> tuple[bool, RemoteError | None]:
        """Write chunks that wait for it to the place, for about a second.

        Returns:
            Whether this is over for now, either because no chunk waits any more or because one can't be written; and in that case the error.
        """
        until = time.monotonic() + _UPLOAD_SECONDS
        for name, op in self._book.outbox():
            if not _needs_upload(op):
                continue
            if time.monotonic() >= until:
                return False, None
            with self._uploading:
                try:
                    self._write(name)
                except RemoteError as error:
                    return True, error
        return True, None

    def _write(self, name: str) -> None:
        """Write the chunk of the op that waits under this name, unless that is done or isn't wanted any more."""
        op = self._index.get(name)
        if op is None or not _needs_upload(op):
            return
        done = None if self._book.find(ChunkKey(op["key"])) else self._upload(ChunkKey(op["key"]))
        with self._index.transaction():
            now = self._index.get(name)
            wanted = now is not None and _needs_upload(now)
            if wanted and done is not None:
                self._index.set(name, done)
                self._book.written(done)
            elif wanted:
                self._book.told(name)
        if done is not None and not wanted:  # removed meanwhile, or another process has written it
            with contextlib.suppress(RemoteError):
                self._objects.delete([done["object"]])


def tellable(outbox: Sequence[tuple[str, Op]], *, all_of_it: bool) -> list[tuple[str, Op]]:
    """What of the outbox can be told: what needs no chunk to be written first.

    Args:
        outbox: what waits, in order.
        all_of_it: documents whose chunks can't be written now count as well: others compute what they find missing.
    """
    unwritten = set() if all_of_it else {op["key"] for _, op in outbox if _needs_upload(op)}
    behind: set[tuple[str, str]] = set()
    found = []
    for name, op in outbox:
        if _needs_upload(op):
            continue
        if "id" in op:
            # What is said of one document keeps its order.
            place = op["tenant"], op["id"]
            if place in behind or not unwritten.isdisjoint(op.get("chunks", ())):
                behind.add(place)
                continue
        found.append((name, op))
    return found


def _needs_upload(op: Op) -> bool:
    return op["op"] == "chunk" and "object" not in op
