"""Which documents were removed or replaced lately, and whether that was before or after a request began.

A request takes a while, and the chunks that it missed are stored after it. If their document is removed meanwhile, its text must not
come back. So each change of a document gets a number, and each request remembers the number of the last change before it began. The
numbers are shared by all stores that this process has open on one folder. They are never written to disk.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from pathlib import Path
from weakref import WeakValueDictionary

__all__ = ["Removals", "changes_so_far", "removals_of"]

MOST = 1 << 16
"""Changes that are remembered of a store. To a request older than the last one forgotten, every document counts as removed."""


class _Number:
    """The number of the last change in this process."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.last = 0

    def in_child(self) -> None:
        self.lock = threading.Lock()  # a thread that didn't survive the fork may have held it


_NUMBER = _Number()
os.register_at_fork(after_in_child=_NUMBER.in_child)


def changes_so_far() -> int:
    """The number of the last change of any document in this process. Later changes get larger numbers."""
    return _NUMBER.last


class _Book:
    """The number of the latest change by name. Older names are forgotten; only the largest number among them is kept."""

    def __init__(self, most: int) -> None:
        self._most, self._numbers, self._forgotten = most, OrderedDict[bytes, int](), 0

    def note(self, name: bytes, number: int) -> None:
        self._numbers[name] = number
        self._numbers.move_to_end(name)
        if len(self._numbers) > self._most:
            _, self._forgotten = self._numbers.popitem(last=False)

    def last(self, name: bytes) -> int:
        """The number of a name's last change. If the name may have been forgotten, the largest forgotten number counts."""
        return max(self._numbers.get(name, 0), self._forgotten)


class Removals:
    """The changes of one store's documents. Safe to use from many threads.

    Attributes:
        texts_gone: how often texts may have left a document, so far.
    """

    def __init__(self, most: int = MOST) -> None:
        self._documents, self._tenants = _Book(most), _Book(most)
        self.texts_gone = 0

    def note(self, tenant: str, document: str | None, *, gone: bool = True) -> None:
        """Remember that a document is being removed or replaced.

        Args:
            tenant: the tenant that the document belongs to.
            document: the document's id. None: all documents of the tenant.
            gone: whether the document loses texts.
        """
        book = self._tenants if document is None else self._documents
        name = _name(tenant, document)
        with _NUMBER.lock:
            _NUMBER.last += 1
            book.note(name, _NUMBER.last)
            self.texts_gone += gone

    def since(self, number: int, tenant: str, document: str | None) -> bool:
        """Whether a document, or all that belongs to its tenant, was removed or replaced after the change with this number."""
        with _NUMBER.lock:
            last = self._tenants.last(_name(tenant, None))
            if document is not None:
                last = max(last, self._documents.last(_name(tenant, document)))
            return last > number


_OPEN: WeakValueDictionary[str, Removals] = WeakValueDictionary()


def removals_of(path: Path | None) -> Removals:
    """The changes of the store in a folder, shared by all that have it open. A store in memory gets its own."""
    if path is None:
        return Removals()
    with _NUMBER.lock:
        return _OPEN.setdefault(os.path.realpath(path), Removals())


def _name(tenant: str, document: str | None) -> bytes:
    parts = [tenant] if document is None else [tenant, document]
    data = b"".join(len(part := text.encode("utf-8", "surrogatepass")).to_bytes(8, "big") + part for text in parts)
    return hashlib.blake2b(data, digest_size=16).digest()
