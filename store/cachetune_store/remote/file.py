"""A chunk file in a remote place, as an open file on disk looks to what reads it."""

from __future__ import annotations

import errno
from collections.abc import Sequence

from ..buffers import PAGE, round_up
from ..errors import RemoteError
from .objects import Objects

__all__ = ["RemoteFile"]


class RemoteFile:
    """An object that holds a chunk file.

    Args:
        objects: where it is.
        name: the object's name.
        size: its bytes, as the catalogue says.
        head: bytes of its head, as the catalogue says, so that one request brings all of it.
    """

    def __init__(self, objects: Objects, name: str, size: int, head: int) -> None:
        self._objects, self._name = objects, name
        self.size = size
        self._guess = max(PAGE, head)
        self._head = memoryview(b"")

    def head(self, count: int) -> memoryview:
        """At least the first `count` bytes, or the whole object if it is shorter.

        Raises:
            RemoteError: they can't be read.
        """
        if len(self._head) < min(count, self.size):
            want = min(round_up(max(count, self._guess)), self.size)
            area = memoryview(bytearray(want))
            self._head = area[: self._objects.read(self._name, [0], [area])[0]]
        return self._head

    def drop_head(self) -> None:
        """Give back the memory of `head`."""
        self._head = memoryview(b"")

    def read(self, area: memoryview, position: int) -> int:
        """Fill `area` from `position` on. Returns how many bytes were read.

        Raises:
            OSError: the place can't be read.
        """
        return self.read_ranges([area], [position])[0]

    def read_ranges(self, areas: Sequence[memoryview], positions: Sequence[int]) -> list[int]:
        """Fill several areas by as few requests as possible, side by side. Returns how many bytes were read of each.

        Raises:
            OSError: the place can't be read.
        """
        try:
            return self._objects.read(self._name, positions, areas)
        except RemoteError as error:
            raise OSError(errno.EIO, str(error)) from error

    def close(self) -> None:
        """Nothing is open."""
