"""Heads of chunk files that were read before, so that the next time a file is opened nothing of it is read until rows are wanted."""

from __future__ import annotations

import threading
from collections import OrderedDict

from ..chunk import ChunkHead
from ..chunkfile import ParsedHead
from ..keys import ChunkKey
from ..rawfile import RawFile

__all__ = ["KnownHeads"]

_OBJECTS = 2048
"""Bytes of a head beside its numbers and its text, about."""


class KnownHeads:
    """Checked heads in memory, each of a file as it was then. Those unused for longest are dropped. Safe to use from several threads.

    A file is known again by its device, inode, time of change and length: files are replaced as a whole, and never written to. Rows are checked by the sums
    in the head, so a head in memory is worth as much as one that is read again.

    Not kept are heads of encrypted files, which hold the file's key: it must not outlive the tenant's secret. Nor are those of format 1 with deviations,
    which are long.

    Args:
        limit: bytes that all of them may take.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held: OrderedDict[ChunkKey, tuple[ParsedHead, tuple[int, ...], int]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def find(self, key: ChunkKey, file: RawFile) -> ParsedHead | None:
        """The head of this open file, if it is known."""
        with self._lock:
            found = self._held.get(key)
            if found is None or found[1] != _state(file):
                return None
            self._held.move_to_end(key)
            return found[0]

    def keep(self, key: ChunkKey, file: RawFile, parsed: ParsedHead) -> None:
        """Keep what was read of this open file."""
        if parsed.head.seal.hides or parsed.deviations is not None:
            return
        size = _size(parsed.head)
        with self._lock:
            self._drop(key)
            self._held[key] = parsed, _state(file), size
            self._bytes += size
            while self._bytes > self._limit:
                self._drop(next(iter(self._held)))

    def drop(self, key: ChunkKey) -> None:
        """Forget a chunk's head, if it is known."""
        with self._lock:
            self._drop(key)

    def clear(self) -> None:
        """Forget all of them."""
        with self._lock:
            self._held.clear()
            self._bytes = 0

    def _drop(self, key: ChunkKey) -> None:
        _, _, size = self._held.pop(key, (None, (), 0))
        self._bytes -= size


def _state(file: RawFile) -> tuple[int, ...]:
    return *file.identity, file.size


def _size(head: ChunkHead) -> int:
    numbers = (head.order.nbytes, head.token_ids.nbytes, head.scores.nbytes, head.checksums.nbytes)
    return sum(numbers) + len(head.text or "") + _OBJECTS
