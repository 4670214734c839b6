"""Groups of chunks that were made alike, and removing chunks that can't be used any more.

Model, dtype and lead-ins are part of a chunk's key. So a chunk that was made with others is never opened by mistake. It only takes room
until it is evicted or pruned.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping

from .chunk import ChunkHead
from .errors import ErasedChunkError, RemoteError, StoreKeyError, UnknownFormatError
from .keys import ChunkKey
from .placement import Placement
from .stats import ChunkGroup, PruneReport, TenantStats
from .tiers import DiskTier

__all__ = ["Keep", "by_tenant", "groups", "prune"]

Keep = Callable[[ChunkHead], bool]
"""Says of a chunk, by its head, whether it stays."""


def groups(placement: Placement) -> list[ChunkGroup]:
    """Groups of chunks that were made alike, the largest first. The head of every file of this machine is read."""
    found: dict[tuple[str, str], ChunkGroup] = {}
    for key, head in _heads(placement, shared=False):
        if isinstance(head, ChunkHead):
            group = ChunkGroup(head.namespace, head.layout.codec, 1, placement.size_of(key))
            old = found.get(name := (head.namespace.digest, head.layout.codec))
            found[name] = group if old is None else old + group
    return sorted(found.values(), key=lambda g: (-g.bytes, g.namespace.digest, g.codec))


def by_tenant(found: Iterable[ChunkGroup], documents: Mapping[str, int]) -> list[TenantStats]:
    """Groups and counts of documents summed up by tenant, the largest first."""
    chunks: Counter[str] = Counter()
    size: Counter[str] = Counter()
    for group in found:
        chunks[group.namespace.tenant] += group.chunks
        size[group.namespace.tenant] += group.bytes
    all_of_them = (
        TenantStats(name, documents.get(name, 0), chunks[name], size[name]) for name in {*chunks, *documents}
    )
    return sorted(all_of_them, key=lambda each: (-each.bytes, each.tenant))


def prune(placement: Placement, keep: Keep, *, foreign_too: bool, dry_run: bool) -> PruneReport:
    """Remove the chunks that `keep` is false for, those of tenants that were deleted, and, if asked to, files of other format versions.

    Damaged files are left to verify().

    Raises:
        RemoteError: a shared place can't be read, so nothing says whether its chunks stay. Nothing is removed then.
    """
    chunks = size = foreign = 0
    for key, of_this_format in list(_doomed(placement, keep, foreign_too)):
        size += placement.size_of(key) if dry_run else placement.remove(key)
        foreign += not of_this_format
        chunks += of_this_format
    disk = placement.find(DiskTier)
    if disk is not None and not dry_run:
        disk.drop_missing()  # a process that was killed while it pruned has deleted files that the index still knows
    return PruneReport(chunks, foreign, size)


def _doomed(placement: Placement, keep: Keep, foreign_too: bool) -> Iterator[tuple[ChunkKey, bool]]:
    """What is to be removed, and whether it is of this format version."""
    for key, head in _heads(placement):
        if isinstance(head, ChunkHead):
            if not keep(head):
                yield key, True
        elif isinstance(head, ErasedChunkError):
            yield key, True
        elif isinstance(head, RemoteError | StoreKeyError):
            raise head
        elif foreign_too and isinstance(head, UnknownFormatError):
            yield key, False


def _heads(placement: Placement, *, shared: bool = True) -> Iterator[tuple[ChunkKey, ChunkHead | Exception]]:
    """The head of every chunk, or the error of reading it, from the slowest tier that has it. Chunks that are removed meanwhile are left out.

    Args:
        placement: where the chunks are.
        shared: whether to read what machines share, too, which takes a request for each chunk.
    """
    seen: set[ChunkKey] = set()
    for tier in reversed(placement.tiers):
        if tier.kind.copies or (tier.kind.shared_by == "machines" and not shared):
            continue
        for key, head in tier.heads():
            if key not in seen:
                seen.add(key)
                yield key, head
