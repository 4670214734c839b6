"""Chunks in files of a directory that several processes may share.

A chunk is stored if its file exists. Files are only renamed and deleted inside the index's transactions, so that all processes agree on
what the budget holds. A reader works on an open descriptor. So an open chunk stays whole if another process evicts or replaces it, and a
chunk that was removed before it is opened is an ordinary miss.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import stat
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from ..buffers import SlabPool
from ..chunk import Chunk, ChunkHead
from ..chunkfile import SUFFIX, encode_file, parse_head
from ..disk_reader import DiskReader
from ..errors import (
    BudgetError,
    DamagedChunkError,
    ErasedChunkError,
    IndexDamagedError,
    StoreError,
    StoreKeyError,
    UnknownCodecError,
)
from ..files import TempFiles, explain, make_directory, sync_directory, unreadable
from ..index import Index
from ..keys import ChunkKey
from ..plainfiles import files_below, remove_any
from ..rawfile import DirectIO, RawFile, identity_of
from ..seals import CHECKSUMS, Seal
from ..stats import Counters, TierStats
from ..texts import drop_text
from ..tier_kinds import DISK
from ..units import format_bytes
from .base import LastingTier, Pins
from .damaged import DamagedFiles, damaged_file
from .file_records import FileRecords
from .known_heads import KnownHeads

__all__ = ["DiskTier"]

_LONGEST_GUESS = 4 << 20
"""Most bytes that are read of a head before its length is known."""
HEAD_MEMORY = 64 << 20
"""Bytes of unused memory that are kept for reading heads, deviations, and rows of encrypted files: enough for the deviations of a hundred long chunks."""
_KNOWN_HEADS = 64 << 20
"""Bytes of heads that are kept: those of some four thousand chunks of 512 tokens."""
_ABSENT = {errno.ENOENT, errno.ENOTDIR}
"""Errors that mean that there is no such file."""

_log = logging.getLogger(__name__)


class DiskTier(LastingTier):
    """A file for each chunk below `directory`/chunks. The least recently used chunk is evicted first.

    Args:
        directory: the store's directory.
        budget: bytes of all chunk files together.
        index: has sizes and times of last use, and is shared with other processes.
        temp: writes files.
        pins: chunks in use by this process.
        pool: gives the memory that rows are read into.
        direct: opens files.
        seal: makes and checks the files' sums.
    """

    kind = DISK

    def __init__(
        self,
        directory: Path,
        *,
        budget: int,
        index: Index,
        temp: TempFiles,
        pins: Pins,
        pool: SlabPool,
        direct: DirectIO,
        seal: Seal = CHECKSUMS,
    ) -> None:
        self.directory = directory / "chunks"
        self.budget = budget
        self.counters = Counters()
        self.index = index
        self._temp = temp
        self._pins = pins
        self.pool = pool
        self._direct = direct
        self.seal = seal
        self._records = FileRecords(index, seal)
        self._damaged = DamagedFiles(directory / "damaged", limit_bytes=budget)
        self._head_bytes = 0
        self._known = KnownHeads(_KNOWN_HEADS)
        self._heads = SlabPool(pinned=False, limit=HEAD_MEMORY)
        self._lock = threading.Lock()

    def path_of(self, key: ChunkKey) -> Path:
        """The path of the chunk's file, whether it exists or not."""
        name = self.seal.chunk_name(key)
        return self.directory / name[:2] / f"{name}{SUFFIX}"

    def stored_keys(self) -> Iterator[ChunkKey]:
        """Keys of all chunk files."""
        for path in files_below(self.directory, SUFFIX):
            with contextlib.suppress(ValueError):
                yield self.seal.chunk_key(path.stem)

    def contains(self, key: ChunkKey) -> bool:
        """See Tier."""
        return self.size_of(key) > 0

    def open(self, key: ChunkKey, errors: list[StoreError] | None = None) -> DiskReader | None:
        """See Tier. A file whose head fails a check is set aside and counted, and None is returned."""
        pin = self._pins.add(key)
        reader = self._open(key, errors)
        if reader is not None:
            reader.pin = pin
            self.touch(key)
        with self._lock:
            self.counters.hits += reader is not None
            self.counters.misses += reader is None
        return reader

    def known_head(self, key: ChunkKey) -> ChunkHead | None:
        """See Tier. It is that of the file which was opened last."""
        parsed = self._known.last(key)
        return None if parsed is None else parsed.head

    def peek(self, key: ChunkKey) -> ChunkHead | None:
        """The head of a chunk, if its file exists and the head is not damaged. Nothing is counted."""
        reader = self._open(key)
        if reader is None:
            return None
        reader.close()
        return reader.head

    def holds(self, key: ChunkKey, *, with_text: bool) -> bool:
        """See LastingTier."""
        head = self.peek(key)
        # Of a file that a killed writer left, the index may not know yet: then it is stored anew.
        return head is not None and self.knows(key) and not (with_text and head.text is None)

    def heads(self) -> Iterator[tuple[ChunkKey, ChunkHead | Exception]]:
        """See Tier."""
        for key in self.stored_keys():
            with contextlib.suppress(FileNotFoundError):
                yield key, self._read_head(key)

    def _read_head(self, key: ChunkKey) -> ChunkHead | Exception:
        try:
            with contextlib.closing(RawFile(self.path_of(key), DirectIO(False))) as file:
                return parse_head(key, file.size, file.head, self.seal).head
        except (DamagedChunkError, UnknownCodecError, StoreKeyError) as error:
            return error

    def touch(self, key: ChunkKey) -> None:
        """See Tier."""
        self._records.touch(key)

    def admit(self, chunk: Chunk) -> list[Chunk]:
        """See Tier. After it returns, the chunk survives a power cut."""
        key, target = chunk.key, self.path_of(chunk.key)
        head, rows = encode_file(chunk, self.seal)
        size = len(head) + sum(map(len, rows))
        if size > self.budget:
            raise BudgetError(
                f"chunk {key} takes {format_bytes(size)} on disk, more than disk_budget ({format_bytes(self.budget)}); "
                "raise the budget or store shorter chunks"
            )

        def publish(written: Path) -> None:
            try:
                with self.index.transaction():
                    self._make_room(key, size)
                    self._records.add(chunk.head, size, time.time())
                    try:
                        written.replace(target)
                    except IsADirectoryError:
                        self._damaged.take(target)
                        written.replace(target)
                    self._known.drop(key)  # the file before it may have been encoded in another way
            except BaseException:
                self._withdraw(written, target, key)
                raise
            sync_directory(target.parent)

        try:
            with self._temp.changing():
                # Room is also made before the file is written, so that files hardly exceed the budget meanwhile.
                with self.index.transaction():
                    self._make_room(key, size)
                make_directory(target.parent)
                self._temp.write([head, *rows], publish, drop_cache=self._direct.active)
        except OSError as error:
            raise explain(error, target) from error
        with self._lock:
            self.counters.bytes_written += size
        return []

    def remove(self, key: ChunkKey) -> int:
        """See Tier. Damaged files of the same key are deleted as well."""
        try:
            with self._temp.changing():
                with self.index.transaction():
                    size = self._unlink(key)
                    self._records.forget(key)
                    drop_text(self.index, key)
                self._damaged.remove(self.seal.chunk_name(key))
        except OSError as error:
            raise explain(error, self.path_of(key)) from error
        return size

    def set_aside(self, key: ChunkKey) -> bool:
        """See LastingTier. The file is moved away.

        The file is checked again for that, because another process may have replaced it by a good one, and a failed read may succeed
        the next time. If it can't be moved away, it stays, and each use of the chunk is a miss.
        """
        # Whether the file is damaged or not: its head in memory and what was read of it don't fit together.
        self._known.drop(key)
        seen = damaged_file(self.path_of(key), key, self.pool, self.seal, self._direct)
        if seen is None:
            return False
        try:
            with self._temp.changing():
                if not self._take_away(key, seen):
                    return False
        except (OSError, StoreError) as error:
            _log.warning("%s is damaged, and setting it aside failed: %s", self.path_of(key), error)
        with self._lock:
            self.counters.damaged += 1
        return True

    def adopt(self, head: ChunkHead, size: int, used: float) -> bool:
        """Add a file that the index doesn't know, or knows with another size. Returns whether it was added."""
        if self._records.size_of(head.key) == size:
            self._records.note_text(head)
            return False
        self._records.add(head, size, used)
        return True

    def knows(self, key: ChunkKey) -> bool:
        """Whether the index has the chunk."""
        return self._records.knows(key)

    def is_missing(self, key: ChunkKey) -> bool:
        """Whether there is no plain file of `key`. One that can't be looked at now is not missing."""
        try:
            return not stat.S_ISREG(self.path_of(key).lstat().st_mode)
        except OSError as error:
            return error.errno in _ABSENT

    def drop_missing(self) -> int:
        """Delete index entries without a file. Returns how many."""
        dropped = 0
        with self.index.transaction():
            for key in self._records.chunks():
                if self.is_missing(key):
                    self._records.forget(key)
                    dropped += 1
        return dropped

    def recount(self) -> None:
        """Compute the totals from the entries again."""
        self._records.recount()

    def size_of(self, key: ChunkKey) -> int:
        """Bytes of the chunk's file; 0 if there is no plain file."""
        try:
            status = self.path_of(key).lstat()
        except OSError:
            return 0
        return status.st_size if stat.S_ISREG(status.st_mode) else 0

    def flush(self) -> None:
        """See LastingTier."""
        self._records.flush()

    def stats(self) -> TierStats:
        """See Tier."""
        total = self._records.total()
        with self._lock:
            return TierStats(
                self.name, total["chunks"], total["bytes"], self.budget, len(self._pins), **asdict(self.counters)
            )

    def close(self) -> None:
        """See Tier."""
        self._known.clear()
        with contextlib.suppress(StoreError):
            self.flush()

    def _open(self, key: ChunkKey, errors: list[StoreError] | None = None) -> DiskReader | None:
        errors = [] if errors is None else errors
        path = self.path_of(key)
        try:
            file = RawFile(path, self._direct, self._head_bytes, self._heads)
        except FileNotFoundError:
            self._known.drop(key)
            return None
        except DamagedChunkError as error:
            self._note_damage(key, error, errors)
            return None
        except OSError as error:
            errors.append(unreadable(error, path))
            return None
        if (known := self._known.find(key, file)) is not None:
            return DiskReader(known, file, self.pool, self._heads)
        try:
            parsed = parse_head(key, file.size, file.head, self.seal)
        except UnknownCodecError:
            # The file is good where its codec is registered.
            file.close()
            return None
        except StoreKeyError as error:
            file.close()
            errors.append(error)
            return None
        except ErasedChunkError:
            file.close()
            with contextlib.suppress(StoreError):  # a store that is only read keeps it
                self.remove(key)
            return None
        except (DamagedChunkError, OSError) as error:
            file.close()
            self._note_damage(key, error, errors)
            return None
        file.drop_head()
        # Chunks of a corpus have heads of about the same length. Reading the whole head at once saves a second read.
        self._head_bytes = min(parsed.rows_start, _LONGEST_GUESS)
        self._known.keep(key, file, parsed)
        return DiskReader(parsed, file, self.pool, self._heads)

    def _note_damage(self, key: ChunkKey, error: DamagedChunkError | OSError, errors: list[StoreError]) -> None:
        if self.set_aside(key):
            errors.append(DamagedChunkError(f"chunk {key} was damaged and is set aside: {error}"))
        elif isinstance(error, OSError):
            errors.append(unreadable(error, self.path_of(key)))

    def _take_away(self, key: ChunkKey, seen: tuple[int, int, int]) -> bool:
        """Move the file of `key` away and forget it, if it still has the identity `seen`. Returns whether it was moved."""
        moved = False
        try:
            with self.index.transaction():
                moved = self._move_aside(key, seen)
                if moved:
                    self._records.forget(key)
        except IndexDamagedError:
            # The index will be made anew when it is next needed. The file must be moved away by then.
            return moved or self._move_aside(key, seen)
        return moved

    def _move_aside(self, key: ChunkKey, seen: tuple[int, int, int]) -> bool:
        """Move the file of `key` away if it still has the identity `seen`. Returns whether it was moved."""
        path = self.path_of(key)
        try:
            return identity_of(path.lstat()) == seen and self._damaged.take(path)
        except FileNotFoundError:
            return False

    def _make_room(self, key: ChunkKey, size: int) -> None:
        """Evict chunks until one of `size` bytes fits in place of the present one of `key`. Called inside a transaction."""
        short = self._records.total()["bytes"] + size - self._records.size_of(key) - self.budget
        if short <= 0:
            return
        victims = self._records.victims(short, lambda digest: digest == key.digest or digest in self._pins)
        if victims is None:
            raise BudgetError(
                f"disk tier: {format_bytes(short)} too little for chunk {key} beside the chunks in use (disk_budget "
                f"{format_bytes(self.budget)}); close readers first or raise the budget"
            )
        for victim in victims:
            self._unlink(victim)
            self._records.forget(victim)
        with self._lock:
            self.counters.evictions += len(victims)

    def _unlink(self, key: ChunkKey) -> int:
        self._known.drop(key)  # also where a chunk makes room for others: nobody must expect it here
        path = self.path_of(key)
        try:
            size = path.lstat().st_size
            remove_any(path)
        except FileNotFoundError:
            return 0
        return size

    def _withdraw(self, written: Path, target: Path, key: ChunkKey) -> None:
        """Delete a file that a failed transaction has renamed to its place, unless the index knows an older file of that key."""
        with contextlib.suppress(OSError, StoreError):
            if not written.exists() and not self._records.knows(key):
                target.unlink(missing_ok=True)
