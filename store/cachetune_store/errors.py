"""Errors of the store. Every message names the bad value, what is allowed and what to do."""

from __future__ import annotations

__all__ = [
    "BudgetError",
    "DamagedChunkError",
    "IndexDamagedError",
    "NonFiniteError",
    "StoreArgumentError",
    "StoreClosedError",
    "StoreError",
    "StoreForkedError",
    "StoreFullError",
    "StoreLockedError",
    "StorePathError",
    "StoreReadOnlyError",
    "StoreVersionError",
    "UnknownCodecError",
    "UnknownDocumentError",
    "UnknownFormatError",
]


class StoreError(Exception):
    """Base class of the store's errors."""


class StoreArgumentError(StoreError, ValueError):
    """An argument is of the wrong type, out of range, or doesn't fit the other arguments."""


class StoreVersionError(StoreError):
    """The directory holds a store of a format version that this release can't read."""


class StorePathError(StoreError):
    """The store's directory can't be made, read or written."""


class StoreReadOnlyError(StorePathError):
    """The store's directory can be read but not written. The store serves what it has, and stores nothing."""


class StoreFullError(StorePathError):
    """The file system has no room left. What was stored before is unchanged."""


class StoreLockedError(StoreError):
    """Another process holds one of the store's locks and doesn't release it."""


class StoreClosedError(StoreError):
    """The store was used after close()."""


class StoreForkedError(StoreError):
    """The store was opened before this process was forked off. Open it in each process."""


class BudgetError(StoreError):
    """A chunk doesn't fit into a tier's budget, either alone or beside the chunks in use."""


class DamagedChunkError(StoreError):
    """A chunk file has a wrong length, shape or checksum. Treat the chunk as missing."""


class UnknownFormatError(DamagedChunkError):
    """A chunk file says that another format version wrote it.

    The version is part of every key, so no key of this release names such a file. A file that is opened by its key and says so is
    damaged. A file that is found in a walk over all files belongs to another release.
    """


class IndexDamagedError(StoreError):
    """The index can't be read, or holds something that the store never writes. It is rebuilt from the files."""


class IndexReplacedError(IndexDamagedError):
    """Another process has made a new index and is still filling it, or the index was deleted while it was open."""


class UnknownCodecError(StoreArgumentError):
    """No codec of that name is registered."""


class UnknownDocumentError(StoreError, LookupError):
    """No document of that id is known for that tenant."""


class NonFiniteError(StoreArgumentError):
    """Keys, values or scores hold an infinity or NaN that a codec or the ranking can't represent."""
