"""Objects by name, in a place that many machines share: what the remote tier needs of an object store."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np

__all__ = ["Buffer", "Objects", "copied"]

Buffer: TypeAlias = bytes | memoryview


class Objects(ABC):
    """Objects by name. All methods may be called from several threads.

    An object is there whole or not at all. It is never changed, only written and deleted, so what was read of it once stays true.
    Every method raises RemoteError, or RemoteRefusedError, if the place can't be used.

    Attributes:
        place: the place, for messages; it holds no password.
    """

    place: str

    @abstractmethod
    def get(self, name: str, limit: int) -> bytes | None:
        """All of an object; None if there is none.

        Raises:
            RemoteError: it has more than `limit` bytes.
        """

    @abstractmethod
    def read(self, name: str, starts: Sequence[int], areas: Sequence[memoryview]) -> list[int]:
        """Fill areas with what an object holds from these places on. Returns how many bytes each has got: fewer where the object ends.

        Raises:
            MissingObjectError: there is no such object.
        """

    @abstractmethod
    def put(self, name: str, parts: Sequence[Buffer], *, create: bool = False) -> bool:
        """Write an object of these parts. With `create`, only if there is none of that name. Returns whether it was written."""

    @abstractmethod
    def delete(self, names: Iterable[str]) -> None:
        """Delete objects. Those that don't exist are passed over."""

    @abstractmethod
    def names(self, prefix: str) -> Iterator[str]:
        """Names that begin with `prefix`, a folder with its slash, in no particular order."""

    @abstractmethod
    def close(self) -> None:
        """Release connections."""


def copied(found: Any, area: memoryview) -> int:
    """Copy to `area` what a client has given in memory of its own. Returns how many bytes that was."""
    count = min(len(area), len(found))
    # NumPy lets other threads run while it copies.
    np.copyto(np.frombuffer(area, np.uint8)[:count], np.frombuffer(found, np.uint8)[:count])
    return count
