"""Checking and repairing a store on disk."""

from __future__ import annotations

import contextlib

from .chunk import ChunkHead
from .chunkfile import parse_head
from .documents import Documents
from .errors import DamagedChunkError, UnknownCodecError, UnknownFormatError
from .files import TempFiles
from .keys import ChunkKey, make_key
from .rawfile import DirectIO, RawFile
from .readers import DiskReader
from .stats import VerifyReport
from .tiers.disk import DiskTier

__all__ = ["COMPLETE", "check_files"]

COMPLETE = "meta/complete"
"""Index record that says the index covers the files; missing in a new index, and in one whose rebuild was cut short."""


def check_files(tier: DiskTier, documents: Documents, temp: TempFiles, *, full: bool) -> VerifyReport:
    """Check every file (all of it, or the head only), set damaged ones aside, and bring the index in line."""
    removed = temp.clean()
    checked = total = adopted = foreign = 0
    damaged: list[ChunkKey] = []
    for key in tier.stored_keys():
        try:
            found = _check_file(tier, key, full=full)
        except UnknownFormatError:
            # One that the index knows was written by this release, so its version is what was damaged.
            if not tier.knows(key):
                foreign += 1
            elif tier.set_aside(key):
                damaged.append(key)
            continue
        except (DamagedChunkError, OSError):
            if tier.set_aside(key):
                damaged.append(key)
            continue
        if found is not None:
            head, size, used = found
            checked += 1
            total += size
            with tier.index.transaction():
                # Only if it is still there: another process may have evicted it meanwhile.
                if tier.contains(key):
                    adopted += tier.adopt(head, size, used)
    dropped = tier.drop_missing()
    documents.rebuild()
    tier.index.set(COMPLETE, 1)
    return VerifyReport(
        checked=checked,
        bytes=total,
        damaged=tuple(damaged),
        temp_files=removed,
        adopted=adopted,
        dropped=dropped,
        documents=documents.count(),
        foreign=foreign,
    )


def _check_file(tier: DiskTier, key: ChunkKey, *, full: bool) -> tuple[ChunkHead, int, float] | None:
    """Head, size and last change of a healthy file; None for one that is gone or needs a codec not loaded here."""
    path = tier.path_of(key)
    try:
        # Through the page cache: a check of all files must not end because one can't be read directly.
        file = RawFile(path, DirectIO(False))
    except FileNotFoundError:
        return None
    with contextlib.closing(file):
        try:
            head, start = parse_head(key, file.size, file.head)
        except UnknownCodecError:
            return None
        if full:
            reader = DiskReader(head, file, start, tier.pool)
            reader.read_all()
            if not reader.padding_is_clear():
                raise DamagedChunkError(f"chunk {key}: bytes between the layers have changed")
            if make_key(head.namespace, head.token_ids.tolist()) != key:
                raise DamagedChunkError(f"chunk {key}: the key is not that of the tokens in the file")
        return head, file.size, file.modified
