"""Where chunks are: the tiers of a store, and what moves between them."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterable
from typing import Any

from .chunk import Chunk
from .claims import Claims
from .errors import BudgetError, StoreArgumentError, StoreError
from .index import Index
from .keys import ChunkKey
from .printing import shown
from .readers import ChunkReader, DiskReader, HostReader
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
        """Bytes of a chunk that needn't be stored again; 0 if it must be."""
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
        """Take a chunk in; bytes it takes in the lowest tier."""
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
            # Nothing would be gained by reading all of a chunk that can't come up.
            if self._has_room(reader.host_bytes):
                reader.on_promote = self._promote
        return reader

    def whole(self, key: ChunkKey) -> Chunk | None:
        """All of a chunk, from host memory or disk."""
        for tier in self._tiers.values():
            reader = None if tier.kind.copies else tier.open(key)
            if isinstance(reader, HostReader | DiskReader):
                reader.on_close = self._release
                with reader:
                    return reader.read_all()
        return None

    def touch_memory(self, key: ChunkKey) -> int:
        """Note a use of a chunk in memory; bytes that it fills in host memory, or on the device if it is only there."""
        for tier in self._memory:
            tier.touch(key)
        return _lowest(tier.size_of(key) for tier in self._memory)

    def open_in_memory(self, key: ChunkKey) -> ChunkReader | None:
        """As open(), but the disk is left alone; a miss counts as nothing yet."""
        reader: ChunkReader | None = None
        for tier in self._tiers.values():
            # A use counts in the tiers below too, or they would let go of what is used most.
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
        """Whether any tier has the chunk; with `lasting`, whether it would be there after a restart, if there is a disk."""
        if lasting and self.disk is not None:
            return self.disk.contains(key)
        return any(tier.contains(key) for tier in self._tiers.values())

    def discard(self, key: ChunkKey) -> bool:
        """Set a damaged chunk aside; whether it was damaged."""
        removed = sum(tier.remove(key) for tier in self._memory) > 0
        if self.disk is not None:
            return self.disk.set_aside(key)
        if removed:
            evict_text(self._index, key)
            with self._lock:
                self.damaged += 1
        return removed

    def remove(self, key: ChunkKey) -> int:
        """Delete a chunk everywhere; bytes freed on disk, or in memory if there is no disk."""
        freed = [tier.remove(key) for tier in self._tiers.values()]
        if self.disk is not None:
            return freed[-1]
        drop_text(self._index, key)
        return _lowest(freed)

    def size_of(self, key: ChunkKey) -> int:
        """Bytes of a chunk in the lowest tier that has it; 0 if none has."""
        return _lowest(tier.size_of(key) for tier in self._tiers.values())

    def lifetime(self) -> dict[str, TierUsage]:
        """What each tier did over all processes."""
        return {name: log.lifetime() for name, log in self._usage.items()}

    def close(self) -> None:
        """Close the tiers; open readers keep working."""
        self._closed = True
        if self._telling is not None:
            self._telling.join(_TELL_SECONDS)
        self._tell()
        for tier in reversed(self._tiers.values()):
            tier.close()

    def _admit_host(self, chunk: Chunk) -> bool:
        """Keep a chunk in host memory too, if there is room; what must leave and isn't on disk goes down there.

        Only if a document holds it: what another process has deleted must not come back.
        """
        if not self.host.fits(chunk.host_bytes):
            return False
        try:
            evicted = self.host.admit(chunk)
        except BudgetError:
            return False  # everything there is in use
        for victim in evicted:
            if self.disk is not None and not self.disk.contains(victim.key):
                # A chunk that can't be kept is one to compute again, not an error of whoever came next.
                with contextlib.suppress(StoreError, OSError):
                    self._demote(victim, self.disk)
        return True

    def _demote(self, chunk: Chunk, disk: DiskTier) -> None:
        if self._index.get(f"ref/{chunk.key}") is None:
            return
        # Who is computing it stores it.
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
        """Whether a tier above the disk could hold a chunk of `size` bytes at all."""
        return any(tier.fits(size) for tier in self._memory)

    def _promote_to_device(self, chunk: Chunk) -> bool:
        if self._closed or self.device is None:
            return False
        if self.device.contains(chunk.key):
            return True
        try:
            self.device.admit(chunk)
        except BudgetError:
            return False  # too large, or everything there is in use
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
        """Now and then, write to the index what was gathered: on a thread, for no request waits for a file that it needn't."""
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
