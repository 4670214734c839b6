"""Checking and repairing a store on disk."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

from .checking import CheckedFile, check_file
from .documents import Documents
from .errors import DamagedChunkError, ErasedChunkError, StoreKeyError, UnknownFormatError
from .files import TempFiles
from .keys import ChunkKey
from .rawfile import DirectIO, RawFile
from .stats import VerifyReport
from .texts import drop_stray_texts
from .tiers.disk import DiskTier

__all__ = ["Found", "apply", "check_files", "compare_files"]

_NAMED = 3
"""Files that can't be read, of which the log says the names."""

_log = logging.getLogger(__name__)


@dataclass
class Found:
    """What a check of all files found."""

    checked: int = 0
    bytes: int = 0
    adopted: int = 0
    foreign: int = 0
    damaged: list[ChunkKey] = field(default_factory=list)
    unreadable: list[ChunkKey] = field(default_factory=list)


def check_files(tier: DiskTier, *, full: bool) -> Found:
    """Check every file (all of it, or only its head), set damaged ones aside, and add those that the index doesn't know."""
    found = Found()
    for key in tier.stored_keys():
        try:
            file = _check(tier, key, full=full)
        except UnknownFormatError:
            # If the index knows the file, this release wrote it, so its version number is damaged.
            if not tier.knows(key):
                found.foreign += 1
            elif tier.set_aside(key):
                found.damaged.append(key)
            continue
        except ErasedChunkError:
            tier.remove(key)
            continue
        except StoreKeyError:
            found.unreadable.append(key)
            continue
        except (DamagedChunkError, OSError) as error:
            if tier.set_aside(key):
                found.damaged.append(key)
            elif isinstance(error, OSError):
                found.unreadable.append(key)
            continue
        if file is not None:
            found.checked += 1
            found.bytes += file.size
            found.adopted += _adopt(tier, key, file)
    return found


def apply(found: Found, tier: DiskTier, documents: Documents, temp: TempFiles) -> VerifyReport:
    """The end of a check: remove entries without a file, count anew, and clean up after writers that died."""
    removed = temp.clean()
    dropped = tier.drop_missing()
    tier.recount()
    _finish(tier, documents, temp, found.unreadable)
    return VerifyReport(
        checked=found.checked,
        bytes=found.bytes,
        damaged=tuple(found.damaged),
        temp_files=removed,
        adopted=found.adopted,
        dropped=dropped,
        documents=documents.count(),
        foreign=found.foreign,
        unreadable=tuple(found.unreadable),
    )


def compare_files(tier: DiskTier, documents: Documents, temp: TempFiles | None) -> None:
    """Make the index agree with the files by their names and lengths. Only files that the index doesn't know are opened.

    For the index this does the same as a check of all files, in much less time. A killed writer damages no files, but it may have renamed
    or deleted some in a transaction that was rolled back.

    Args:
        tier: the files.
        documents: the documents.
        temp: keeps the mark of what couldn't be read; None for a store that is only read.
    """
    sizes = {key: tier.size_of(key) for key in tier.stored_keys()}
    tier.drop_missing()
    known = {name.removeprefix("chunk/") for name in tier.index.names("chunk/")}
    in_line = sum(sizes.values()) == tier.stats().bytes
    unreadable = []
    for key in sizes:
        if key.digest not in known or not in_line:
            try:
                if (found := _check(tier, key, full=False)) is not None:
                    _adopt(tier, key, found)
            except DamagedChunkError:
                pass  # such a file is set aside when it is used
            except (OSError, StoreKeyError):
                unreadable.append(key)
    _finish(tier, documents, temp, unreadable)


def _finish(tier: DiskTier, documents: Documents, temp: TempFiles | None, unreadable: Sequence[ChunkKey]) -> None:
    """Bring documents and texts in line with the files, and say what couldn't be read. That is looked for again when the store is opened."""
    skipped = documents.rebuild()
    drop_stray_texts(tier.index)
    unknown = [key for key in unreadable if not tier.knows(key)]
    for key in unknown[:_NAMED]:
        _log.warning(
            "%s can't be read now, so its chunk is not used; it is looked at again when the store is next opened",
            tier.path_of(key),
        )
    if len(unknown) > _NAMED:
        _log.warning("and %d more chunks can't be read now", len(unknown) - _NAMED)
    if temp is None:
        return
    if unknown or skipped:
        temp.doubt()
    else:
        temp.settle()


def _adopt(tier: DiskTier, key: ChunkKey, found: CheckedFile) -> bool:
    with tier.index.transaction():
        # Another process may have evicted it meanwhile.
        return not tier.is_missing(key) and tier.adopt(found.head, found.size, found.modified)


def _check(tier: DiskTier, key: ChunkKey, *, full: bool) -> CheckedFile | None:
    """The file of `key`, checked; None if it was removed or needs a codec that isn't registered."""
    try:
        # Without direct I/O, so that a file that can't be read that way doesn't end the check.
        return check_file(key, RawFile(tier.path_of(key), DirectIO(False)), tier.pool, tier.seal, full=full)
    except FileNotFoundError:
        return None
