"""The tiers of a store, and how chunks move between them."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterable, Sequence
from typing import TypeVar

from .chunk import Chunk, ChunkHead
from .claims import Claims
from .disk_reader import DiskReader
from .errors import BudgetError, DamagedChunkError, StoreArgumentError, StoreError
from .index import Index
from .keeping import Keeper
from .keys import ChunkKey
from .printing import shown
from .read_speed import ReadSpeed
from .readers import ChunkReader, HostReader
from .seals import CHECKSUMS
from .stats import TierUsage
from .texts import drop_text, evict_text, note_text
from .tier_kinds import TierKind
from .tiers import LastingTier, Tier
from .usage import UsageLog

__all__ = ["Placement"]

_TELL_SECONDS = 30.0
_T = TypeVar("_T", bound=Tier)


class Placement:
    """An ordered list of tiers, of which each says of itself what matters here (`TierKind`). No tier is known by name.

    Chunks are looked for in the tiers' order. A new chunk goes to its *home*, the fastest tier that lasts (or, if none lasts, the fastest
    that holds more than copies). It then goes to the other tiers that last, and to memory while there is room.

    A chunk that was read whole comes up, to the slowest tier in memory that is faster and has room. One that must leave memory
    and is in no tier that lasts goes down to its home.

    Args:
        tiers: the tiers, the fastest first. One at least holds more than copies.
        index: where texts are noted if no tier lasts. Tiers that last note them themselves.
        claims: who computes which chunk.

    Attributes:
        speeds: how fast each tier has read lately that isn't in memory, by name.
    """

    def __init__(self, tiers: Sequence[Tier], index: Index, claims: Claims) -> None:
        self._index = index
        self._claims = claims
        self._lock = threading.Lock()
        self._closed = False
        self._tiers: dict[str, Tier] = {tier.name: tier for tier in tiers}
        self._memory = tuple(tier for tier in tiers if tier.kind.in_memory)
        self._lasting = tuple(tier for tier in tiers if isinstance(tier, LastingTier))
        self._home: Tier = self._lasting[0] if self._lasting else next(t for t in tiers if not t.kind.copies)
        self._usage = {name: UsageLog(index, name, tier.counters) for name, tier in self._tiers.items()}
        self.speeds = {tier.name: ReadSpeed() for tier in tiers if not tier.kind.in_memory}
        self._told = time.monotonic()
        self._telling: threading.Thread | None = None
        self._keeper = Keeper(self._keep)
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

    def find(self, kind: type[_T]) -> _T | None:
        """The tier of this class, if the store has one."""
        return next((tier for tier in self._tiers.values() if isinstance(tier, kind)), None)

    def known(self, key: ChunkKey, text: str | None) -> int:
        """Bytes of a chunk that is stored already; 0 if it has to be stored."""
        for tier in self._lasting:
            if tier.holds(key, with_text=bool(text)):
                tier.touch(key)
                for other in self._lasting[1:]:
                    other.offer(key)
                return tier.size_of(key)
        if self._lasting or (text and self._index.get(f"text/{key}") is None):
            return 0
        self._home.touch(key)
        return self._home.size_of(key)

    def put(self, chunk: Chunk) -> int:
        """Store a chunk. Returns the bytes that it takes in its home."""
        victims = self._home.admit(chunk)
        if not isinstance(self._home, LastingTier):
            for victim in victims:
                evict_text(self._index, victim.key)
            note_text(self._index, chunk.head, CHECKSUMS)
            return chunk.host_bytes
        for tier in self._lasting[1:]:
            tier.admit(chunk)
        for memory in self._memory:
            if not memory.kind.copies:
                self._admit(memory, chunk)
        return self._home.size_of(chunk.key) or chunk.slab.numel()

    def open(self, key: ChunkKey, errors: list[StoreError]) -> ChunkReader | None:
        """A reader from the fastest tier that has the chunk; `errors` gets why a chunk that is there can't be used."""
        reader = self.open_in_memory(key)
        if reader is not None:
            return reader
        for tier in self._tiers.values():
            if reader is None and not tier.kind.in_memory:
                reader = tier.open(key, errors)
        with self._lock:
            self.hits += reader is not None
            self.misses += reader is None
        if reader is not None:
            reader.on_close = self._release
            if isinstance(reader, DiskReader):
                reader.speed = self.speeds[reader.tier]
            # If no tier in memory has room for the chunk, it is not read as a whole.
            if any(tier.fits(reader.host_bytes) for tier in self._memory):
                source = self._tiers[reader.tier]
                reader.on_promote = lambda chunk: self._promote(source, chunk)
        return reader

    def whole(self, key: ChunkKey) -> Chunk | None:
        """All of a chunk, from a tier that holds more than copies; None if none has it."""
        for tier in self._tiers.values():
            reader = None if tier.kind.copies else tier.open(key)
            if isinstance(reader, HostReader | DiskReader):
                reader.on_close = self._release
                with reader:
                    return reader.read_all()
        return None

    def whole_here(self, key: ChunkKey) -> Chunk | None:
        """All of a chunk, from a tier that other machines don't share; None if none has it sound."""
        for tier in self._tiers.values():
            if tier.kind.copies or tier.kind.shared_by == "machines":
                continue
            reader = tier.open(key)
            if isinstance(reader, HostReader | DiskReader):
                try:
                    with reader:
                        return reader.read_all()
                except DamagedChunkError:
                    self.discard(key)
        return None

    def touch_memory(self, key: ChunkKey) -> int:
        """Count a chunk in memory as used now. Returns the bytes that it takes in host memory, or on the device if it is only there."""
        for tier in self._memory:
            tier.touch(key)
        return _lowest(tier.size_of(key) for tier in self._memory)

    def touch(self, key: ChunkKey) -> None:
        """Count a chunk as used now in every tier that has it, as opening it does."""
        for tier in self._tiers.values():
            tier.touch(key)

    def open_in_memory(self, key: ChunkKey) -> ChunkReader | None:
        """As open(), but only from tiers in memory. A miss is not counted."""
        reader: ChunkReader | None = None
        for tier in self._tiers.values():
            # The chunk also counts as used in the tiers below, which would otherwise evict the chunks that are used most.
            if reader is not None:
                tier.touch(key)
            elif tier.kind.in_memory:
                reader = tier.open(key)
        if reader is not None:
            reader.on_close = self._release
            source = self._tiers[reader.tier]
            if source is not self._memory[0]:
                reader.on_promote = lambda chunk: self._promote(source, chunk)
            with self._lock:
                self.hits += 1
        return reader

    def foresee(self, key: ChunkKey) -> tuple[TierKind, ChunkHead] | None:
        """The kind of the tier that would give the chunk, and the chunk's head, as far as is known without waiting for anything."""
        for tier in self._tiers.values():
            head = tier.known_head(key)
            if head is not None:
                return tier.kind, head
        return None

    def contains(self, key: ChunkKey, *, lasting: bool = False) -> bool:
        """Whether any tier has the chunk. With `lasting`, only tiers that last count, if there are any."""
        tiers = self._lasting if lasting and self._lasting else self._tiers.values()
        return any(tier.contains(key) for tier in tiers)

    def discard(self, key: ChunkKey) -> bool:
        """Set a chunk aside where it is damaged. Returns whether it was, in any tier."""
        removed = sum(tier.remove(key) for tier in self._memory) > 0
        if self._lasting:
            return sum(tier.set_aside(key) for tier in self._lasting) > 0  # all of them are looked at
        if removed:
            evict_text(self._index, key)
            with self._lock:
                self.damaged += 1
        return removed

    def remove(self, key: ChunkKey) -> int:
        """Delete a chunk in all tiers. Returns the bytes that were freed in its home (or in memory, if no tier lasts)."""
        freed = {tier.name: tier.remove(key) for tier in self._tiers.values()}
        if self._lasting:
            return freed[self._home.name]
        drop_text(self._index, key)
        return _lowest(freed.values())

    def forget(self, keys: Iterable[ChunkKey]) -> int:
        """Delete chunks in the tiers that other machines don't share, because those have deleted them. Returns the bytes that were freed."""
        freed = 0
        for key in keys:
            freed += _lowest([tier.remove(key) for tier in self._tiers.values() if tier.kind.shared_by != "machines"])
            drop_text(self._index, key)
        return freed

    def forget_tenant(self, tenant: str) -> None:
        """Drop the chunks of a tenant from memory. In tiers that last, nobody can read them any more."""
        for tier in self._memory:
            for key, head in list(tier.heads()):
                if not isinstance(head, Exception) and head.namespace.tenant == tenant:
                    tier.remove(key)

    def size_of(self, key: ChunkKey) -> int:
        """Bytes of a chunk in the slowest tier that has it; 0 if none has."""
        return _lowest(tier.size_of(key) for tier in self._tiers.values())

    def settle(self) -> None:
        """Return once chunks that came from slower tiers are in the home, too."""
        self._keeper.wait()

    def lifetime(self) -> dict[str, TierUsage]:
        """What each tier did in all processes."""
        return {name: log.lifetime() for name, log in self._usage.items()}

    def close(self) -> None:
        """Close the tiers. Open readers keep working."""
        self._closed = True
        self._keeper.close()
        if self._telling is not None:
            self._telling.join(_TELL_SECONDS)
        self._tell()
        for tier in reversed(self._tiers.values()):
            tier.close()

    def _admit(self, tier: Tier, chunk: Chunk) -> bool:
        """Keep a chunk in a tier in memory, if there is room. Chunks that make room and are in no tier that lasts go to their home."""
        if not tier.fits(chunk.host_bytes):
            return False
        try:
            evicted = tier.admit(chunk)
        except BudgetError:
            return False  # all chunks there are in use
        for victim in evicted:
            if self._lasting and not self.contains(victim.key, lasting=True):
                # If the evicted chunk can't be written, it will be computed again. The present caller gets no error.
                with contextlib.suppress(StoreError, OSError):
                    self._demote(victim, self._home)
        return True

    def _demote(self, chunk: Chunk, home: Tier) -> None:
        """Store a chunk that leaves memory, if a document holds it: what another process has deleted must not come back."""
        if self._index.get(f"ref/{chunk.key}") is None:
            return
        # If another job is computing the chunk, that job stores it.
        with self._claims.claim([chunk.key]) as claim:
            if claim.keys and not home.contains(chunk.key):
                home.admit(chunk)
                home.counters.demotions += 1

    def _keep(self, chunk: Chunk) -> None:
        """Write a chunk from a slower tier that lasts to the home, unless it was deleted meanwhile."""
        if self._home.contains(chunk.key) or not self.contains(chunk.key, lasting=True):
            return
        self._home.admit(chunk)
        self._home.counters.promotions += 1
        if not any(tier.contains(chunk.key) for tier in self._lasting[1:]):
            self._home.remove(chunk.key)

    def _promote(self, source: Tier, chunk: Chunk) -> bool:
        """Put a chunk of one tier into memory above it. Returns whether it is there then."""
        tiers = list(self._tiers.values())
        if isinstance(source, LastingTier) and source is not self._home:
            self._keeper.add(chunk)
        for place in reversed(range(tiers.index(source))):
            tier, key = tiers[place], chunk.key
            if not tier.kind.in_memory or self._closed:
                continue
            if tier.contains(key):
                return True
            if not self._admit(tier, chunk):
                continue
            if not any(below.contains(key) for below in tiers[place + 1 :] if not below.kind.copies):
                # Deleted while it was being read: a deleted chunk must not come back.
                tier.remove(key)
                return False
            tier.counters.promotions += 1
            return True
        return False

    def _release(self, reader: ChunkReader) -> None:
        tier = self._tiers[reader.tier]
        with self._lock:
            tier.counters.bytes_read += reader.bytes_read
        if reader.seconds:
            self._usage[tier.name].add_read(reader.seconds)
        if self._lasting and not self._closed:
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
            for tier in self._lasting:
                tier.flush()
            for log in self._usage.values():
                log.flush()


def _lowest(sizes: Iterable[int]) -> int:
    """Of a chunk's sizes in the tiers, the fastest first, the one in the slowest tier that has it; 0 if none has."""
    return next((size for size in reversed(list(sizes)) if size), 0)
