"""What the store reports about itself."""

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
    failed: int = 0


@dataclass(frozen=True)
class TierStats:
    """What one tier holds now, and what it did in this process.

    Attributes:
        chunks: chunks held now; on disk, those of all processes.
        bytes: bytes held now. `budget` is the most that there may be.
        pinned: chunks in use by open readers of this process.
        promotions: chunks that came up from the tier below.
        demotions: chunks that came down from the tier above.
        failed: requests that a remote tier didn't answer, or not in time, or with an error.
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
    failed: int = 0


@dataclass(frozen=True)
class TierUsage:
    """What a tier did in all processes that used the store, as far as they have written it to the index.

    Attributes:
        read_seconds: count, mean, p50, p95 and p99 of the seconds that reading a chunk took, without waiting for anything
            else. Only the disk tier has them, because host memory is read in place.
    """

    hits: int
    misses: int
    evictions: int
    damaged: int
    promotions: int
    demotions: int
    bytes_read: int
    bytes_written: int
    failed: int
    read_seconds: dict[str, float | int | None]


@dataclass(frozen=True)
class StoreStats:
    """The whole store. `hits` and `misses` count calls of open(); a chunk that is found in any tier is a hit.

    All numbers count what this process did, except `lifetime`, which has the numbers of all processes for each tier.
    """

    hits: int
    misses: int
    damaged: int
    documents: int
    host: TierStats
    disk: TierStats | None
    lifetime: dict[str, TierUsage]
    device: TierStats | None = None
    remote: TierStats | None = None

    @property
    def tiers(self) -> list[TierStats]:
        """The statistics of the tiers that the store has, the fastest first."""
        return [tier for tier in (self.device, self.host, self.disk, self.remote) if tier is not None]

    def as_dict(self) -> dict[str, Any]:
        """The same as dicts and numbers."""
        return asdict(self)


@dataclass(frozen=True)
class DocumentInfo:
    """A document: its id, its chunks in order, how many of them the store holds now, and their bytes."""

    id: str
    tenant: str
    chunks: tuple[ChunkKey, ...]
    stored: int
    bytes: int


@dataclass(frozen=True)
class ChunkGroup:
    """Chunks that were made alike: with the same namespace (model, tokenizer, dtype, lead-ins and tenant) and codec."""

    namespace: Namespace
    codec: str
    chunks: int
    bytes: int

    def __add__(self, other: ChunkGroup) -> ChunkGroup:
        """Both groups together."""
        return ChunkGroup(self.namespace, self.codec, self.chunks + other.chunks, self.bytes + other.bytes)


@dataclass(frozen=True)
class TenantStats:
    """What a tenant has in the store.

    Attributes:
        tenant: its name, as given; "" for chunks and documents stored without one.
        documents: documents of that tenant.
        chunks: chunks stored now.
        bytes: bytes of these chunks.
    """

    tenant: str
    documents: int
    chunks: int
    bytes: int


@dataclass(frozen=True)
class PruneReport:
    """What pruning removed (or would remove).

    Attributes:
        chunks: removed chunks of this format version.
        foreign: removed files of other format versions.
        bytes: bytes of both.
    """

    chunks: int
    foreign: int
    bytes: int

    def as_dict(self) -> dict[str, int]:
        """The same as a dict of numbers."""
        return asdict(self)


@dataclass(frozen=True)
class VerifyReport:
    """What a check found and repaired.

    Attributes:
        checked: chunk files that were read in full (by rebuild_index: only their heads).
        bytes: bytes of these files.
        damaged: keys of files that were set aside.
        temp_files: files of dead writers that were deleted.
        adopted: files that were added to the index.
        dropped: entries without a file that were removed from the index.
        documents: documents known afterwards.
        foreign: files of other format versions. They are not changed; `prune` removes them.
        unreadable: keys of files that could not be read, but are not known to be damaged. They are not changed.
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
        """The same as a dict of numbers and strings."""
        keys = {"damaged": self.damaged, "unreadable": self.unreadable}
        return asdict(self) | {name: [str(key) for key in found] for name, found in keys.items()}
