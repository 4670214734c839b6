"""Checking one chunk file."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from .buffers import SlabPool
from .chunk import ChunkHead
from .chunkfile import parse_head
from .disk_reader import DiskReader
from .errors import DamagedChunkError, UnknownCodecError
from .keys import ChunkKey, make_key
from .rawfile import RawFile
from .seals import Seal

__all__ = ["CheckedFile", "check_file"]


@dataclass(frozen=True)
class CheckedFile:
    """A healthy file.

    Attributes:
        head: all of the chunk but its rows.
        size: the file's bytes.
        modified: when it was last changed, in seconds since the epoch.
    """

    head: ChunkHead
    size: int
    modified: float


def check_file(key: ChunkKey, file: RawFile, pool: SlabPool, seal: Seal, *, full: bool) -> CheckedFile | None:
    """Check the file of `key`, all of it or the head only, and close it. None if it needs a codec not loaded here.

    Raises:
        DamagedChunkError: it fails a check.
        OSError: it can't be read.
    """
    with contextlib.closing(file):
        try:
            parsed = parse_head(key, file.size, file.head, seal)
        except UnknownCodecError:
            return None
        head = parsed.head
        if full:
            reader = DiskReader(parsed, file, pool)
            reader.read_all()
            if not reader.padding_is_clear():
                raise DamagedChunkError(f"chunk {key}: bytes that mean nothing have changed")
            if make_key(head.namespace, head.token_ids.tolist()) != key:
                raise DamagedChunkError(f"chunk {key}: the key is not that of the tokens in the file")
        return CheckedFile(head, file.size, file.modified)
