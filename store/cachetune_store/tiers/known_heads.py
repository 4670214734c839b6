"""Heads of chunk files that were read before, so that the next time a file is opened nothing of it is read until rows are wanted."""

from __future__ import annotations

import sys
import threading
from collections import Counter, OrderedDict

from ..chunk import ChunkHead
from ..chunkfile import ParsedHead
from ..keys import ChunkKey, Namespace
from ..rawfile import RawFile

__all__ = ["KnownHeads"]

_OBJECTS = 2048
"""Bytes of a head beside its numbers and its text, about; and of a namespace beside its lead-ins."""
_TOKEN = 40
"""Bytes of a number in a tuple."""


class KnownHeads:
    """Checked heads in memory, each of a file as it was then. Those unused for longest are dropped. Safe to use from several threads.

    A file is known again by its device, inode, times of change and length: files are replaced as a whole, and never written to. Rows are checked by the sums
    in the head, so a head in memory is worth as much as one that is read again. Where they don't match, the head is dropped (`DiskTier.set_aside`).

    Not kept are heads of encrypted files, which hold the file's key: it must not outlive the tenant's secret. Nor are those of format 1 with deviations,
    which are long.

    Args:
        limit: bytes that all of them may take.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held: OrderedDict[ChunkKey, tuple[ParsedHead, tuple[int, ...], int]] = OrderedDict()
        self._namespaces: Counter[int] = (
            Counter()
        )  # heads of each, by its id: hashing the lead-ins would take longer than all else
        self._bytes = 0
        self._lock = threading.Lock()

    @property
    def bytes(self) -> int:
        """What the heads take, about."""
        return self._bytes

    def find(self, key: ChunkKey, file: RawFile) -> ParsedHead | None:
        """The head of this open file, if it is known."""
        with self._lock:
            found = self._held.get(key)
            if found is None or found[1] != _state(file):
                return None
            self._held.move_to_end(key)
            return found[0]

    def last(self, key: ChunkKey) -> ParsedHead | None:
        """The head of the file as it was when it was opened last, if it is known. No file is looked at."""
        with self._lock:
            found = self._held.get(key)
            return None if found is None else found[0]

    def keep(self, key: ChunkKey, file: RawFile, parsed: ParsedHead) -> None:
        """Keep what was read of this open file."""
        if parsed.head.seal.hides or parsed.deviations is not None:
            return
        size = _size(parsed.head)
        with self._lock:
            self._drop(key)
            self._held[key] = parsed, _state(file), size
            self._bytes += size
            namespace = parsed.head.namespace
            if not self._namespaces[id(namespace)]:
                self._bytes += _size_of_namespace(namespace)
            self._namespaces[id(namespace)] += 1
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
            self._namespaces.clear()
            self._bytes = 0

    def _drop(self, key: ChunkKey) -> None:
        parsed, _, size = self._held.pop(key, (None, (), 0))
        self._bytes -= size
        if parsed is not None:
            namespace = parsed.head.namespace
            self._namespaces[id(namespace)] -= 1
            if not self._namespaces[id(namespace)]:
                del self._namespaces[id(namespace)]
                self._bytes -= _size_of_namespace(namespace)


def _state(file: RawFile) -> tuple[int, ...]:
    # The time of the last change can't be set by those who copy a file's times along with its content.
    return *file.identity, file.changed, file.size


def _size(head: ChunkHead) -> int:
    numbers = (head.order.nbytes, head.token_ids.nbytes, head.scores.nbytes, head.checksums.nbytes)
    return sum(numbers) + sys.getsizeof(head.text) + _OBJECTS


def _size_of_namespace(namespace: Namespace) -> int:
    """Heads of one namespace have one object of it."""
    return _TOKEN * sum(map(len, namespace.lead_ins)) + _OBJECTS
