"""Errors of the store. Every message names the bad value, what is allowed and what to do."""

from __future__ import annotations

__all__ = [
    "BudgetError",
    "DamagedChunkError",
    "ErasedChunkError",
    "IndexDamagedError",
    "MissingObjectError",
    "NonFiniteError",
    "RemoteError",
    "RemoteRefusedError",
    "StoreArgumentError",
    "StoreClosedError",
    "StoreError",
    "StoreForkedError",
    "StoreFullError",
    "StoreKeyError",
    "StoreLockedError",
    "StorePathError",
    "StoreReadOnlyError",
    "StoreVersionError",
    "UnknownCodecError",
    "UnknownDocumentError",
    "UnknownFormatError",
]


class StoreError(Exception):
    """Base of everything the store raises on its own account."""


class StoreArgumentError(StoreError, ValueError):
    """An argument can't be meant: it is of the wrong kind, out of range, or doesn't belong to the others."""


class StoreVersionError(StoreError):
    """The directory holds a store of a format version that this release can't read."""


class StoreKeyError(StoreError):
    """The store has a key and it wasn't given, or another one was; or one was given, and the store has none."""


class StorePathError(StoreError):
    """The store's directory can't be made, read or written."""


class StoreReadOnlyError(StorePathError):
    """The store's directory may be read here, but not written: it answers from what it has, and stores nothing."""


class StoreFullError(StorePathError):
    """The file system has no room left; what was stored before is untouched."""


class RemoteError(StorePathError):
    """The remote tier doesn't answer, or not in time, or with an error. It may the next time."""


class RemoteRefusedError(RemoteError):
    """The remote tier refuses this user, or there is no such bucket."""


class MissingObjectError(RemoteError):
    """There is no object of this name in the remote tier."""


class StoreLockedError(StoreError):
    """Another process holds a lock of the store's, and doesn't let go of it."""


class StoreClosedError(StoreError):
    """The store was used after close()."""


class StoreForkedError(StoreError):
    """The store was opened before this process was forked off; open it in each process."""


class BudgetError(StoreError):
    """A chunk doesn't fit a tier's byte budget, alone or beside the chunks in use."""


class DamagedChunkError(StoreError):
    """A chunk file fails its length, shape or checksum; treat the chunk as missing."""


class ErasedChunkError(DamagedChunkError):
    """A chunk file was written for a tenant that was deleted since: nobody can read it any more, and it is deleted where it is found."""


class UnknownFormatError(DamagedChunkError):
    """A chunk file says that another format version wrote it.

    As the version is part of every key, no key of this release names such a file: opened by key it is a damaged one, met
    in a walk over all files it is somebody else's.
    """


class IndexDamagedError(StoreError):
    """The index can't be read (or holds something it must never hold); it is rebuilt from the files."""


class IndexReplacedError(IndexDamagedError):
    """A new index is in place and not filled yet, or filling it was cut short, or the index was deleted meanwhile."""


class UnknownCodecError(StoreArgumentError):
    """No codec of that name is registered."""


class UnknownDocumentError(StoreError, LookupError):
    """No document of that id is known for that tenant."""


class NonFiniteError(StoreArgumentError):
    """Keys, values or scores hold an infinity or NaN that a codec or the ranking can't represent."""
