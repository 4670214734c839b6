"""A reader of a chunk in the remote tier."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..buffers import SlabPool
from ..chunkfile import ParsedHead
from ..disk_reader import DiskReader
from ..errors import DamagedChunkError, MissingObjectError
from ..tier_kinds import REMOTE
from .file import RemoteFile

__all__ = ["BYTES_TOGETHER", "RemoteReader"]

BYTES_TOGETHER = 1 << 20
"""Bytes that are asked for at once. A request takes about as long as this much takes at 10 Gb/s, so smaller ones would wait more than move."""


class RemoteReader(DiskReader):
    """Rows in a remote place, read as from disk. Layers of few bytes are fetched together with the next ones.

    Args:
        parsed, file, pool, scratch: as for DiskReader.
        failed: called with the error of a request that failed.
    """

    kind = REMOTE

    def __init__(
        self,
        parsed: ParsedHead,
        file: RemoteFile,
        pool: SlabPool,
        failed: Callable[[OSError], None],
        scratch: SlabPool | None = None,
    ) -> None:
        super().__init__(parsed, file, pool, scratch)
        self._remote = file
        self._failed = failed

    def fetch(self, layer: int, rows: int) -> int:
        """See DiskReader.fetch. The same rows of the next layers come along, while they are few bytes and nobody else reads them."""
        self._prepare()
        layers, wanted, size = [layer], [self._missing(layer, rows)], 0
        try:
            for number in range(layer + 1, len(self._covered)):
                size += len(wanted[-1][1])
                if size >= BYTES_TOGETHER or not self._locks[number].acquire(blocking=False):
                    break
                layers.append(number)
                if self._covered[number] >= rows:
                    wanted.append((0, memoryview(b"")))
                else:
                    wanted.append(self._missing(number, rows))
            return self._fetch(layers, wanted, rows)
        finally:
            for number in layers[1:]:
                self._locks[number].release()

    def _fetch_deviations(self) -> Tensor:
        """See DiskReader."""
        try:
            return super()._fetch_deviations()
        except DamagedChunkError as error:
            if isinstance(error.__cause__, OSError):
                self._note_failure(error.__cause__)
            raise

    def _note_failure(self, error: OSError) -> None:
        """A request failed, which says something about the place unless the object is gone."""
        if not isinstance(error.__cause__, MissingObjectError):
            self._failed(error)

    def _fetch(self, layers: list[int], wanted: list[tuple[int, memoryview]], rows: int) -> int:
        """Read the wanted areas of these layers. Their locks are held. Only the first layer's failure is an error now. Returns the bytes that were read."""
        pairs = [(layer, start, area) for layer, (start, area) in zip(layers, wanted, strict=True) if len(area)]
        try:
            counts = self._remote.read_ranges([area for *_, area in pairs], [start for _, start, _ in pairs])
        except OSError as error:
            self._note_failure(error)
            raise DamagedChunkError(f"chunk {self.key}: layer {layers[0]} can't be read ({error.strerror})") from error
        for (layer, _, area), count in zip(pairs, counts, strict=True):
            self._bytes[layer] += count
            try:
                if count != len(area):
                    raise DamagedChunkError(f"chunk {self.key}: the object ends inside layer {layer}")
                self._accept(layer, rows, area)
            except DamagedChunkError:
                if layer == layers[0]:
                    raise
        return sum(counts)
