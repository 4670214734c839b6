"""The tiers of a store, and how chunks move between them."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterable
from typing import Any

from .chunk import Chunk
from .claims import Claims
from .disk_reader import DiskReader
from .errors import BudgetError, StoreArgumentError, StoreError
from .index import Index
from .keys import ChunkKey
from .printing import shown
from .readers import ChunkReader, HostReader
from .stats import TierUsage
from .texts import drop_text, evict_text, note_text
from .tiers import DeviceTier, DiskTier, HostTier, Tier
from .tiers.memory import MemoryTier
from .usage import UsageLog

__all__ = ["Placement"]

_TELL_SECONDS = 30.0


class Placement:
    """Host memory over disk, or host memory alone; and above it a device's memory, if there is one.

    New chunks go to disk and, while there is room, to host memory. A chunk that was read whole from disk comes up; one
    that must leave host memory and isn't on disk any more goes down. A chunk that is promoted out of host memory is copied
    to the device; so is one from disk that host memory has no room for.

    Args:
        host: the upper tier.
        disk: the lower tier, if there is one.
        index: where texts are noted if there is no disk tier, which else does it.
        claims: who computes which chunk.
        device: the tier on top, if there is one; it holds copies only.
    """

    def __init__(
        self,
        host: HostTier,
        disk: DiskTier | None,
        index: Index,
        claims: Claims,
        device: DeviceTier | None = None,
    ) -> None:
        self.device = device
        self.host = host
        self.disk = disk
        self._index = index
        self._claims = claims
        self._lock = threading.Lock()
        self._closed = False
        # Chunks are looked for in this order: the fastest tier first.
        self._memory: tuple[MemoryTier[Any], ...] = (host,) if device is None else (device, host)
        self._tiers: dict[str, Tier] = {tier.name: tier for tier in (*self._memory, *([disk] if disk else []))}
        self._usage = {name: UsageLog(index, name, tier.counters) for name, tier in self._tiers.items()}
        self._told = time.monotonic()
        self._telling: threading.Thread | None = None
        self.hits = self.misses = self.damaged = 0

    @property
    def tiers(self) -> tuple[Tier, ...]:
        """The tiers, the fastest first."""
        return tuple(self._tiers.values())

    def tier(self, name: str) -> Tier:
        """The tier of this name.

        Raises:
            StoreArgumentError: this store has none of this name.
        """
        try:
            return self._tiers[name]
        except (KeyError, TypeError):
            raise StoreArgumentError(
                f"tier is {shown(name)}: this store has {', '.join(map(repr, self._tiers))}; use one of them"
            ) from None

    def known(self, key: ChunkKey, text: str | None) -> int:
        """Bytes of a chunk that is stored already; 0 if it has to be stored."""
        if self.disk is not None:
            head = self.disk.peek(key)
            if head is None or (text and head.text is None):
                return 0
            self.disk.touch(key)
            return self.disk.size_of(key)
        if text and self._index.get(f"text/{key}") is None:
            return 0
        self.host.touch(key)
        return self.host.size_of(key)

    def put(self, chunk: Chunk) -> int:
        """Store a chunk. Returns the bytes that it takes in the lowest tier."""
        if self.disk is not None:
            self.disk.admit(chunk)
            self._admit_host(chunk)
            return self.disk.size_of(chunk.key) or chunk.slab.numel()
        for victim in self.host.admit(chunk):
            evict_text(self._index, victim.key)
        note_text(self._index, chunk.head)
        return chunk.host_bytes

    def open(self, key: ChunkKey, errors: list[StoreError]) -> ChunkReader | None:
        """A reader from the highest tier that has the chunk; `errors` gets why a file that is there can't be used."""
        reader = self.open_in_memory(key)
        if reader is not None:
            return reader
        if self.disk is not None:
            reader = self.disk.open(key, errors)
        with self._lock:
            self.hits += reader is not None
            self.misses += reader is None
        if reader is not None:
            reader.on_close = self._release
            # If no tier above has room for the chunk, it is not read as a whole.
            if self._has_room(reader.host_bytes):
                reader.on_promote = self._promote
        return reader

    def whole(self, key: ChunkKey) -> Chunk | None:
        """All of a chunk, from host memory or disk; None if neither has it."""
        for tier in self._tiers.values():
            reader = None if tier.kind.copies else tier.open(key)
            if isinstance(reader, HostReader | DiskReader):
                reader.on_close = self._release
                with reader:
                    return reader.read_all()
        return None

    def touch_memory(self, key: ChunkKey) -> int:
        """Count a chunk in memory as used now. Returns the bytes that it takes in host memory, or on the device if it is only there."""
        for tier in self._memory:
            tier.touch(key)
        return _lowest(tier.size_of(key) for tier in self._memory)

    def open_in_memory(self, key: ChunkKey) -> ChunkReader | None:
        """As open(), but without the disk. A miss is not counted."""
        reader: ChunkReader | None = None
        for tier in self._tiers.values():
            # The chunk also counts as used in the tiers below, which would otherwise evict the chunks that are used most.
            if reader is not None:
                tier.touch(key)
            elif tier.kind.in_memory:
                reader = tier.open(key)
        if reader is not None:
            reader.on_close = self._release
            if not reader.kind.copies and self.device is not None:
                reader.on_promote = self._promote_to_device
            with self._lock:
                self.hits += 1
        return reader

    def contains(self, key: ChunkKey, *, lasting: bool = False) -> bool:
        """Whether any tier has the chunk. With `lasting`, only the disk counts, if there is one."""
        if lasting and self.disk is not None:
            return self.disk.contains(key)
        return any(tier.contains(key) for tier in self._tiers.values())

    def discard(self, key: ChunkKey) -> bool:
        """Set a chunk aside if it is damaged. Returns whether it was."""
        removed = sum(tier.remove(key) for tier in self._memory) > 0
        if self.disk is not None:
            return self.disk.set_aside(key)
        if removed:
            evict_text(self._index, key)
            with self._lock:
                self.damaged += 1
        return removed

    def remove(self, key: ChunkKey) -> int:
        """Delete a chunk in all tiers. Returns the bytes that were freed on disk, or in memory if there is no disk."""
        freed = [tier.remove(key) for tier in self._tiers.values()]
        if self.disk is not None:
            return freed[-1]
        drop_text(self._index, key)
        return _lowest(freed)

    def size_of(self, key: ChunkKey) -> int:
        """Bytes of a chunk in the lowest tier that has it; 0 if none has."""
        return _lowest(tier.size_of(key) for tier in self._tiers.values())

    def lifetime(self) -> dict[str, TierUsage]:
        """What each tier did in all processes."""
        return {name: log.lifetime() for name, log in self._usage.items()}

    def close(self) -> None:
        """Close the tiers. Open readers keep working."""
        self._closed = True
        if self._telling is not None:
            self._telling.join(_TELL_SECONDS)
        self._tell()
        for tier in reversed(self._tiers.values()):
            tier.close()

    def _admit_host(self, chunk: Chunk) -> bool:
        """Keep a chunk in host memory too, if there is room. Evicted chunks that are not on disk are written there.

        Only if a document holds it: what another process has deleted must not come back.
        """
        if not self.host.fits(chunk.host_bytes):
            return False
        try:
            evicted = self.host.admit(chunk)
        except BudgetError:
            return False  # all chunks there are in use
        for victim in evicted:
            if self.disk is not None and not self.disk.contains(victim.key):
                # If the evicted chunk can't be written, it will be computed again. The present caller gets no error.
                with contextlib.suppress(StoreError, OSError):
                    self._demote(victim, self.disk)
        return True

    def _demote(self, chunk: Chunk, disk: DiskTier) -> None:
        if self._index.get(f"ref/{chunk.key}") is None:
            return
        # If another job is computing the chunk, that job stores it.
        with self._claims.claim([chunk.key]) as claim:
            if claim.keys and not disk.contains(chunk.key):
                disk.admit(chunk)
                disk.counters.demotions += 1

    def _promote(self, chunk: Chunk) -> bool:
        if self._closed or self.disk is None:
            return False
        if self.host.contains(chunk.key):
            return True
        if not self._admit_host(chunk):
            return self._promote_to_device(chunk)
        if not self.disk.contains(chunk.key):
            # Deleted while it was being read: a deleted chunk must not come back.
            self.host.remove(chunk.key)
            return False
        self.host.counters.promotions += 1
        return True

    def _has_room(self, size: int) -> bool:
        """Whether a chunk of `size` bytes fits into the budget of a tier above the disk."""
        return any(tier.fits(size) for tier in self._memory)

    def _promote_to_device(self, chunk: Chunk) -> bool:
        if self._closed or self.device is None:
            return False
        if self.device.contains(chunk.key):
            return True
        try:
            self.device.admit(chunk)
        except BudgetError:
            return False  # it is too large, or all chunks there are in use
        if not self.host.contains(chunk.key) and not (self.disk is not None and self.disk.contains(chunk.key)):
            # Deleted while it was in use: a deleted chunk must not come back.
            self.device.remove(chunk.key)
            return False
        self.device.counters.promotions += 1
        return True

    def _release(self, reader: ChunkReader) -> None:
        tier = self._tiers[reader.tier]
        with self._lock:
            tier.counters.bytes_read += reader.bytes_read
        if reader.seconds:
            self._usage[tier.name].add_read(reader.seconds)
        if self.disk is not None and not self._closed:
            self._tell_later()

    def _tell_later(self) -> None:
        """Write collected uses and counts to the index, now and then, on a thread, so that no request waits for it."""
        with self._lock:
            if time.monotonic() - self._told < _TELL_SECONDS or (self._telling and self._telling.is_alive()):
                return
            self._told = time.monotonic()
            self._telling = threading.Thread(target=self._tell, name="cachetune-index", daemon=True)
            self._telling.start()

    def _tell(self) -> None:
        with contextlib.suppress(StoreError):
            if self.disk is not None:
                self.disk.flush()
            for log in self._usage.values():
                log.flush()


def _lowest(sizes: Iterable[int]) -> int:
    """Of a chunk's sizes in the tiers, the fastest first, the one in the slowest tier that has it; 0 if none has."""
    return next((size for size in reversed(list(sizes)) if size), 0)
