"""Chunks in files of a directory that several processes may share.

The files are the truth: a chunk is there if its file is. Names change (rename, unlink) only inside the index's
transactions, so that processes agree on what the budget holds. A reader works on its open descriptor; whatever another
process evicts or replaces, an open chunk stays whole, and a chunk gone before it is opened is a plain miss.
"""

from __future__ import annotations

import contextlib
import errno
import stat
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from ..buffers import SlabPool, memory_of
from ..checking import check_file
from ..chunk import Chunk, ChunkHead
from ..chunkfile import SUFFIX, encode_head, parse_head
from ..errors import BudgetError, DamagedChunkError, IndexDamagedError, StoreError, UnknownCodecError
from ..files import TempFiles, explain, make_directory, sync_directory, unreadable
from ..index import Index
from ..keys import ChunkKey
from ..plainfiles import remove_any
from ..printing import shown
from ..rawfile import DirectIO, RawFile, identity_of
from ..readers import DiskReader
from ..stats import Counters, TierStats
from ..texts import drop_text, evict_text, note_text
from ..tier_kinds import DISK
from ..units import format_bytes
from .base import Pins, Tier
from .damaged import DamagedFiles
from .lru import LruOrder

__all__ = ["DiskTier"]

_LONGEST_GUESS = 4 << 20
"""Most bytes of a head that are read before it is known how long it is."""
HEAD_MEMORY = 64 << 20
"""Bytes of memory that heads were read into and that are kept for the next ones: those of a hundred long chunks."""
_LOST = {errno.EIO, errno.EBADMSG, errno.EUCLEAN}
"""Errors of reading that say that the disk or the file system has lost what stood there. Others pass."""


class DiskTier(Tier):
    """One file a chunk under `directory`/chunks, least recently used first out.

    Args:
        directory: the store's directory.
        budget: bytes of all chunk files together.
        index: sizes and last use; shared with other processes.
        temp: files being written.
        pins: chunks in use by this process.
        pool: memory that rows are read into.
        direct: how files are opened.
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
    ) -> None:
        self.directory = directory / "chunks"
        self.budget = budget
        self.counters = Counters()
        self.index = index
        self._temp = temp
        self._pins = pins
        self.pool = pool
        self._direct = direct
        self._lru = LruOrder(index)
        self._damaged = DamagedFiles(directory / "damaged", limit_bytes=budget)
        self._touched: dict[str, float] = {}
        self._head_bytes = 0
        self._heads = SlabPool(pinned=False, limit=HEAD_MEMORY)
        self._lock = threading.Lock()

    def path_of(self, key: ChunkKey) -> Path:
        """Where the chunk's file is or would be."""
        return self.directory / key.digest[:2] / f"{key.digest}{SUFFIX}"

    def stored_keys(self) -> Iterator[ChunkKey]:
        """Keys of all files that are there."""
        for path in self.directory.glob(f"*/*{SUFFIX}"):
            with contextlib.suppress(ValueError):
                yield ChunkKey(path.stem)

    def contains(self, key: ChunkKey) -> bool:
        """See Tier."""
        return self.size_of(key) > 0

    def open(self, key: ChunkKey, errors: list[StoreError] | None = None) -> DiskReader | None:
        """See Tier. A file whose head fails a check is set aside and counted; that is a miss.

        `errors` gets why a file that is there can't be used.
        """
        pin = self._pins.add(key)
        reader = self._open(key, errors)
        if reader is not None:
            reader.pin = pin
            self.touch(key)
        with self._lock:
            self.counters.hits += reader is not None
            self.counters.misses += reader is None
        return reader

    def peek(self, key: ChunkKey) -> ChunkHead | None:
        """The head of a chunk that is here and healthy as far as its head goes; counts as nothing."""
        reader = self._open(key)
        if reader is None:
            return None
        reader.close()
        return reader.head

    def touch(self, key: ChunkKey) -> None:
        """See Tier. Uses are gathered and written to the index in one go, off the way of requests."""
        with self._lock:
            self._touched[key.digest] = time.time()

    def admit(self, chunk: Chunk) -> list[Chunk]:
        """See Tier. On return the chunk would survive a power cut."""
        key, target = chunk.key, self.path_of(chunk.key)
        head = encode_head(chunk.head)
        size = len(head) + chunk.slab.numel()
        if size > self.budget:
            raise BudgetError(
                f"chunk {key} takes {format_bytes(size)} on disk, more than disk_budget ({format_bytes(self.budget)}); "
                "raise the budget or store shorter chunks"
            )

        def publish(written: Path) -> None:
            try:
                with self.index.transaction():
                    self._make_room(key, size)
                    self._record(chunk.head, size, time.time())
                    try:
                        written.replace(target)
                    except IsADirectoryError:
                        self._damaged.take(target, key)
                        written.replace(target)
            except BaseException:
                self._withdraw(written, target, key)
                raise
            sync_directory(target.parent)

        self._temp.mark()
        try:
            # Room is made before the bytes are written too, so that disk use hardly passes the budget meanwhile.
            with self.index.transaction():
                self._make_room(key, size)
            make_directory(target.parent)
            self._temp.write([head, memory_of(chunk.slab)], publish, drop_cache=self._direct.active)
        except OSError as error:
            raise explain(error, target) from error
        with self._lock:
            self.counters.bytes_written += size
        return []

    def remove(self, key: ChunkKey) -> int:
        """See Tier. What was set aside under the same key goes as well."""
        self._temp.mark()
        try:
            with self.index.transaction():
                size = self._unlink(key)
                self._forget(key)
                drop_text(self.index, key)
            self._damaged.remove(key)
        except OSError as error:
            raise explain(error, self.path_of(key)) from error
        return size

    def set_aside(self, key: ChunkKey) -> bool:
        """Move the file of `key` out of the way, and count it, if it is damaged; False if it is not, or gone.

        It is looked at again: another process may have put a good file in its place, and a read may fail for once.
        """
        self._temp.mark()
        try:
            seen = self._damage(key)
            if seen is None:
                return False
            moved = False
            try:
                with self.index.transaction():
                    moved = self._move_aside(key, seen)
                    if moved:
                        self._forget(key)
            except IndexDamagedError:
                # The index will be made anew by whoever needs it next; the file must be out of the way by then.
                moved = moved or self._move_aside(key, seen)
            if not moved:
                return False
        except (OSError, StoreError):
            # It stays a miss at every use; nothing better can be done in a directory that refuses changes.
            pass
        with self._lock:
            self.counters.damaged += 1
        return True

    def adopt(self, head: ChunkHead, size: int, used: float) -> bool:
        """Enter a file that the index doesn't know, or knows with another size; whether that was so."""
        record = self.index.get(f"chunk/{head.key}")
        if record is not None and record["size"] == size:
            note_text(self.index, head)
            return False
        self._record(head, size, used)
        return True

    def knows(self, key: ChunkKey) -> bool:
        """Whether the index has the chunk."""
        return self.index.get(f"chunk/{key}") is not None

    def drop_missing(self) -> int:
        """Drop index entries without a file; how many."""
        dropped = 0
        with self.index.transaction():
            for name in list(self.index.names("chunk/")):
                try:
                    key = ChunkKey(name.removeprefix("chunk/"))
                except ValueError as error:
                    raise IndexDamagedError(f"the index holds {shown(name)}, which names no chunk") from error
                if not self.contains(key):
                    self._forget(key)
                    dropped += 1
        return dropped

    def recount(self) -> None:
        """Add up anew what the entries say."""
        with self.index.transaction():
            sizes = [record["size"] for _, record in self.index.items("chunk/")]
            self.index.set("total", self._total() | {"bytes": sum(sizes), "chunks": len(sizes)})

    def size_of(self, key: ChunkKey) -> int:
        """Bytes of the chunk's file; 0 if there is none, or something that is no plain file."""
        try:
            status = self.path_of(key).lstat()
        except OSError:
            return 0
        return status.st_size if stat.S_ISREG(status.st_mode) else 0

    def flush(self) -> None:
        """Write gathered uses to the index."""
        if not self._touched:
            return
        with self.index.transaction():
            with self._lock:
                touched, self._touched = self._touched, {}
            for digest, used in touched.items():
                record = self.index.get(f"chunk/{digest}")
                if record is not None and record["used"] < used:
                    self.index.set(f"chunk/{digest}", record | {"used": used})

    def stats(self) -> TierStats:
        """See Tier."""
        total = self._total()
        with self._lock:
            return TierStats(
                self.name, total["chunks"], total["bytes"], self.budget, len(self._pins), **asdict(self.counters)
            )

    def close(self) -> None:
        """See Tier."""
        with contextlib.suppress(StoreError):
            self.flush()

    def _open(self, key: ChunkKey, errors: list[StoreError] | None = None) -> DiskReader | None:
        errors = [] if errors is None else errors
        path = self.path_of(key)
        try:
            file = RawFile(path, self._direct, self._head_bytes, self._heads)
        except FileNotFoundError:
            return None
        except DamagedChunkError as error:
            self._note_damage(key, error, errors)
            return None
        except OSError as error:
            errors.append(unreadable(error, path))
            return None
        try:
            head, start = parse_head(key, file.size, file.head)
        except UnknownCodecError:
            # Good data for whoever has the codec.
            file.close()
            return None
        except (DamagedChunkError, OSError) as error:
            file.close()
            self._note_damage(key, error, errors)
            return None
        file.drop_head()
        # Chunks of a corpus have heads of about one length, and a disk takes as long for two short reads as for two long ones.
        self._head_bytes = min(start, _LONGEST_GUESS)
        return DiskReader(head, file, start, self.pool)

    def _note_damage(self, key: ChunkKey, error: DamagedChunkError | OSError, errors: list[StoreError]) -> None:
        if self.set_aside(key):
            errors.append(DamagedChunkError(f"chunk {key} was damaged and is set aside: {error}"))
        elif isinstance(error, OSError):
            errors.append(unreadable(error, self.path_of(key)))

    def _damage(self, key: ChunkKey) -> tuple[int, int, int] | None:
        """Which file of `key` is damaged; None if the one that is there is not, or can't be read just now."""
        path = self.path_of(key)
        try:
            file = RawFile(path, self._direct)
        except DamagedChunkError:
            with contextlib.suppress(OSError):
                return identity_of(path.lstat())
            return None
        except OSError:
            return None
        try:
            check_file(key, file, self.pool, full=True)
        except DamagedChunkError:
            return file.identity
        except OSError as error:
            return file.identity if error.errno in _LOST else None
        return None

    def _move_aside(self, key: ChunkKey, seen: tuple[int, int, int]) -> bool:
        """Move the file of `key` away if it is still the one that was `seen`; whether it was."""
        path = self.path_of(key)
        try:
            return identity_of(path.lstat()) == seen and self._damaged.take(path, key)
        except FileNotFoundError:
            return False

    def _make_room(self, key: ChunkKey, size: int) -> None:
        """Evict until a chunk of `size` bytes fits in place of what `key` has now; inside a transaction."""
        total = self._total()
        old = self.index.get(f"chunk/{key}")
        short = total["bytes"] + size - (old["size"] if old else 0) - self.budget
        if short <= 0:
            return
        self.flush()
        victims = self._lru.victims(short, lambda digest: digest == key.digest or digest in self._pins)
        if victims is None:
            raise BudgetError(
                f"disk tier: {format_bytes(short)} too little for chunk {key} beside the chunks in use (disk_budget "
                f"{format_bytes(self.budget)}); close readers first or raise the budget"
            )
        for digest in victims:
            victim = ChunkKey(digest)
            self._unlink(victim)
            self._forget(victim)
        with self._lock:
            self.counters.evictions += len(victims)

    def _record(self, head: ChunkHead, size: int, used: float) -> None:
        with self.index.transaction():
            old = self.index.get(f"chunk/{head.key}")
            self.index.set(f"chunk/{head.key}", {"size": size, "used": used, "tokens": head.layout.tokens})
            note_text(self.index, head)
            self._add_total(size - (old["size"] if old else 0), 0 if old else 1, stored=1)
        self._lru.add(used, head.key.digest)

    def _forget(self, key: ChunkKey) -> None:
        with self.index.transaction():
            record = self.index.get(f"chunk/{key}")
            if record is not None:
                self.index.delete(f"chunk/{key}")
                evict_text(self.index, key)
                self._add_total(-record["size"], -1, stored=0)

    def _unlink(self, key: ChunkKey) -> int:
        path = self.path_of(key)
        try:
            size = path.lstat().st_size
            remove_any(path)
        except FileNotFoundError:
            return 0
        return size

    def _withdraw(self, written: Path, target: Path, key: ChunkKey) -> None:
        """Delete a file that was put in its place by a transaction that then failed, unless it stands for an older one."""
        with contextlib.suppress(OSError, StoreError):
            if not written.exists() and self.index.get(f"chunk/{key}") is None:
                target.unlink(missing_ok=True)

    def _total(self) -> dict[str, int]:
        return self.index.get("total") or {"bytes": 0, "chunks": 0, "stored": 0}

    def _add_total(self, size: int, chunks: int, *, stored: int) -> None:
        total = self._total()
        new = {
            "bytes": total["bytes"] + size,
            "chunks": total["chunks"] + chunks,
            "stored": total["stored"] + stored,
        }
        self.index.set("total", new)
