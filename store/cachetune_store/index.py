"""The index: small records by name. It says what the files can't say quickly; they can say most of it again.

Names used by the store: "chunk/<digest>" (size, last use, tokens), "text/<digest>", "ref/<digest>" (how many documents
hold a chunk), "doc/<tenant>/<id>" (both hashed), "total" (bytes and chunks on disk, and how often one was stored),
"texts" (how often a text came or went), with a remote tier "remote/<digest>", "catalogue", "catalogue-outbox", "outbox/<number>-<id>" and
"waiting/<digest>" (see remote/catalogue.py), and "usage/<tier>" (counters and read times of all processes).
"""

from __future__ import annotations

import contextlib
import copy
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

__all__ = ["COMPLETE", "KEPT", "Index", "MemoryIndex"]

COMPLETE = "meta/complete"
"""Index record, the store's id, that says that the index covers its files; missing in one whose making was cut short."""
KEPT = ("catalogue-outbox", "outbox/", "waiting/")
"""Beginnings of the names of records that no file can say again: what other machines are still to be told. An index that is made anew has them, too."""


class Index(ABC):
    """Records (anything JSON can say) by name, with transactions that exclude all other writers."""

    @abstractmethod
    def transaction(self) -> contextlib.AbstractContextManager[None]:
        """All or nothing of what is done inside; may be nested; one writer at a time, over threads and processes."""

    @abstractmethod
    def get(self, name: str) -> Any:
        """The record, or None."""

    @abstractmethod
    def set(self, name: str, record: Any) -> None:
        """Write a record."""

    @abstractmethod
    def delete(self, name: str) -> bool:
        """Drop a record; whether there was one."""

    @abstractmethod
    def names(self, prefix: str) -> Iterator[str]:
        """Names that begin with `prefix`, in the order of their places."""

    def place(self, name: str) -> str:
        """What names are ordered by: themselves, unless the index hides them."""
        return name

    def count(self, prefix: str) -> int:
        """How many names begin with `prefix`."""
        return sum(1 for _ in self.names(prefix))

    @abstractmethod
    def clear(self) -> None:
        """Drop all records but those of KEPT, as far as these can be read."""

    @contextlib.contextmanager
    def made_anew(self, identity: str) -> Iterator[None]:
        """Drop all records, and let those that are written inside take their place.

        Args:
            identity: the store's id, which says that all records are there.
        """
        self.clear()
        yield
        self.set(COMPLETE, identity)

    @abstractmethod
    def close(self) -> None:
        """Release files; the index may not be used afterwards."""

    def items(self, prefix: str) -> Iterator[tuple[str, Any]]:
        """Names that begin with `prefix`, with their records, in order; those that vanish meanwhile are left out."""
        for name in self.names(prefix):
            record = self.get(name)
            if record is not None:
                yield name, record


class MemoryIndex(Index):
    """An index that lives as long as the process, for a store without a directory."""

    def __init__(self) -> None:
        self._records: dict[str, Any] = {}
        self._lock = threading.RLock()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """See Index. Nothing in memory fails half-way, so there is nothing to roll back."""
        with self._lock:
            yield

    def get(self, name: str) -> Any:
        """See Index."""
        return copy.deepcopy(self._records.get(name))

    def set(self, name: str, record: Any) -> None:
        """See Index."""
        self._records[name] = copy.deepcopy(record)

    def delete(self, name: str) -> bool:
        """See Index."""
        return self._records.pop(name, None) is not None

    def names(self, prefix: str) -> Iterator[str]:
        """See Index."""
        with self._lock:
            found = sorted(name for name in self._records if name.startswith(prefix))
        yield from found

    def clear(self) -> None:
        """See Index."""
        self._records = {name: record for name, record in self._records.items() if name.startswith(KEPT)}

    def close(self) -> None:
        """See Index."""
