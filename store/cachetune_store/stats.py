"""What the store tells about itself: frozen, and plain when asked."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .keys import ChunkKey, Namespace

__all__ = [
    "ChunkGroup",
    "Counters",
    "DocumentInfo",
    "PruneReport",
    "StoreStats",
    "TenantStats",
    "TierStats",
    "TierUsage",
    "VerifyReport",
]


@dataclass
class Counters:
    """Running counts of one tier in this process."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    damaged: int = 0
    promotions: int = 0
    demotions: int = 0
    bytes_read: int = 0
    bytes_written: int = 0


@dataclass(frozen=True)
class TierStats:
    """One tier: what it holds now, and what it did in this process.

    Attributes:
        chunks: chunks held (on disk: by all processes).
        bytes: bytes held, against `budget`.
        pinned: chunks in use by open readers of this process.
        promotions: chunks that came up from the tier below.
        demotions: chunks that came down from the tier above.
    """

    name: str
    chunks: int
    bytes: int
    budget: int
    pinned: int
    hits: int
    misses: int
    evictions: int
    damaged: int
    promotions: int
    demotions: int
    bytes_read: int
    bytes_written: int


@dataclass(frozen=True)
class TierUsage:
    """What a tier did over all processes that used the store (as far as they have told).

    Attributes:
        read_seconds: count, mean, p50, p95 and p99 of the seconds that reading a chunk took, without waiting for anything
            else; host memory is read in place, so only the disk tier has them.
    """

    hits: int
    misses: int
    evictions: int
    damaged: int
    promotions: int
    demotions: int
    bytes_read: int
    bytes_written: int
    read_seconds: dict[str, float | int | None]


@dataclass(frozen=True)
class StoreStats:
    """The whole store. `hits` and `misses` count open(); a chunk found in any tier is a hit.

    All but `lifetime`, which is by tier and of all processes, count what this process did.
    """

    hits: int
    misses: int
    damaged: int
    documents: int
    host: TierStats
    disk: TierStats | None
    lifetime: dict[str, TierUsage]
    device: TierStats | None = None

    @property
    def tiers(self) -> list[TierStats]:
        """The statistics of the tiers that the store has, the fastest first."""
        return [tier for tier in (self.device, self.host, self.disk) if tier is not None]

    def as_dict(self) -> dict[str, Any]:
        """The same as plain dicts and numbers."""
        return asdict(self)


@dataclass(frozen=True)
class DocumentInfo:
    """A document: its id, its chunks in order, and how many of them (and bytes) the store holds now."""

    id: str
    tenant: str
    chunks: tuple[ChunkKey, ...]
    stored: int
    bytes: int


@dataclass(frozen=True)
class ChunkGroup:
    """Chunks that were made alike: by one model, tokenizer, dtype, lead-ins and tenant (the namespace), in one codec."""

    namespace: Namespace
    codec: str
    chunks: int
    bytes: int

    def __add__(self, other: ChunkGroup) -> ChunkGroup:
        """Both together."""
        return ChunkGroup(self.namespace, self.codec, self.chunks + other.chunks, self.bytes + other.bytes)


@dataclass(frozen=True)
class TenantStats:
    """What a tenant has in the store.

    Attributes:
        tenant: its name, as given; "" for chunks and documents stored without one.
        documents: documents of that tenant.
        chunks: chunks stored now.
        bytes: their bytes.
    """

    tenant: str
    documents: int
    chunks: int
    bytes: int


@dataclass(frozen=True)
class PruneReport:
    """What pruning removed (or would remove).

    Attributes:
        chunks: chunks of this format version.
        foreign: files of other format versions.
        bytes: bytes freed by both.
    """

    chunks: int
    foreign: int
    bytes: int

    def as_dict(self) -> dict[str, int]:
        """The same as plain numbers."""
        return asdict(self)


@dataclass(frozen=True)
class VerifyReport:
    """What a check found and repaired.

    Attributes:
        checked: chunk files read in full (by rebuild_index: heads read).
        bytes: their bytes.
        damaged: keys of files that were set aside.
        temp_files: files of dead writers that were deleted.
        adopted: files that the index didn't know.
        dropped: index entries without a file.
        documents: documents known afterwards.
        foreign: files of other format versions; they are left alone (`prune` removes them).
        unreadable: keys of files that could not be read and are not known to be damaged; they are left alone.
    """

    checked: int
    bytes: int
    damaged: tuple[ChunkKey, ...]
    temp_files: int
    adopted: int
    dropped: int
    documents: int
    foreign: int = 0
    unreadable: tuple[ChunkKey, ...] = ()

    @property
    def ok(self) -> bool:
        """True when every chunk could be read and none was damaged."""
        return not self.damaged and not self.unreadable

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values."""
        keys = {"damaged": self.damaged, "unreadable": self.unreadable}
        return asdict(self) | {name: [str(key) for key in found] for name, found in keys.items()}
