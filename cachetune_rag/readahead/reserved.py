"""Host memory that is reserved for chunks which are to be read ahead and are not being read yet."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, islice

from cachetune_rag.readahead.batch import Batch
from cachetune_store import ChunkKey

_log = logging.getLogger(__name__)


class Reserved:
    """Bytes that batches have reserved, and the chunks among theirs that are not open yet.

    It has no lock: everything here is called with the lock of `ReadAhead` held, because what it has must agree with which chunks are being
    read there. That lock guards `Batch.reserved` and `Batch.unopened` too, which are changed here alone.

    Args:
        limit: most bytes of host memory that may be read ahead.
    """

    def __init__(self, limit: int):
        self._limit = limit
        self._bytes = 0
        self._unopened: dict[ChunkKey, Batch] = {}

    @property
    def unopened(self) -> Iterable[ChunkKey]:
        """The chunks that wait to be opened."""
        return self._unopened.keys()

    def reserve(self, batch: Batch, sizes: Sequence[int], reading: int) -> int:
        """Reserve what may be read ahead for chunks of so many bytes, as far as they fit.

        Args:
            reading: bytes of the chunks that are being read already.

        Returns:
            How many of them, the first ones, do.
        """
        totals = [total for total in accumulate(sizes) if total <= self._limit]
        before = self._bytes + reading
        if before and before + sum(sizes) > self._limit:
            totals = []
        batch.reserved = totals[-1] if totals else 0
        self._bytes += batch.reserved
        if len(totals) < len(sizes):
            _log.debug(
                "%d of %d chunks are not read on: there is no room for them", len(sizes) - len(totals), len(sizes)
            )
        return len(totals)

    def reserve_unopened(self, batch: Batch, sizes: Mapping[ChunkKey, int], reading: int) -> int:
        """As `reserve`, for chunks that are opened later: those that fit wait for it."""
        fitting = self.reserve(batch, list(sizes.values()), reading)
        # Of the others nobody else is to think that they will be read.
        batch.unopened = dict(islice(sizes.items(), fitting))
        self._unopened |= dict.fromkeys(batch.unopened, batch)
        return fitting

    def give_up(self, key: ChunkKey) -> None:
        """A request reads this chunk itself: if it waits to be opened, it doesn't any more, and nothing is reserved for it."""
        if (batch := self._unopened.pop(key, None)) is not None:
            self._bytes -= (size := batch.unopened.pop(key))
            batch.reserved -= size

    def forget_unopened(self, batch: Batch) -> list[ChunkKey]:
        """The chunks of a batch that wait to be opened. They don't any more; what is reserved for them stays reserved."""
        keys = list(batch.unopened)
        batch.unopened = {}
        for key in keys:
            self._unopened.pop(key, None)
        return keys

    def free(self, batch: Batch) -> None:
        """The batch's chunks are being read, or not wanted any more."""
        self._bytes -= batch.reserved
        batch.reserved = 0
