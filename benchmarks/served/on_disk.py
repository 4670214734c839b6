"""What vLLM's worker does for the phase `disk`: chunks leave the host's memory, and the disk is made slower on purpose.

vLLM loads `OnDisk` into its worker (`worker_extension_cls`). It needs the connector of this package there.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, cast

from cachetune_rag.readahead.prefetcher import Prefetcher
from cachetune_store import ChunkStore

BREATH = 0.002
"""Seconds between two looks at whether reading in the background has ended."""


class SlowedReads:
    """Makes reads of chunk files take as long as a disk would take that gives so many bytes a second, to all threads together.

    It only imitates such a disk: the bytes come from the real one, and whoever asked for them sleeps until the slow one would have given them.

    Args:
        rate: bytes a second.
        clock, sleep: time.
    """

    def __init__(
        self, rate: float, clock: Callable[[], float] = time.perf_counter, sleep: Callable[[float], None] = time.sleep
    ):
        self._rate, self._clock, self._sleep = rate, clock, sleep
        self._lock, self._free = threading.Lock(), 0.0

    def read(self, count: Callable[[], int]) -> int:
        """Read by calling `count`, which says how many bytes there were, and return these."""
        began = self._clock()
        got = count()
        with self._lock:  # one read behind the other, as a disk gives them
            self._free = max(self._free, began) + got / self._rate
            until = self._free
        self._sleep(max(0.0, until - self._clock()))
        return got


_slowed: SlowedReads | None = None
_read: Callable[..., int] | None = None


def slow_down(rate: float | None) -> None:
    """Make this process's reads of chunk files as slow as a disk of `rate` bytes a second; None: as quick as they are."""
    global _slowed, _read
    from cachetune_store.rawfile import RawFile

    _slowed = None if rate is None else SlowedReads(rate)
    if _read is None and rate is not None:
        read = _read = RawFile.read

        def slowed(file: RawFile, area: memoryview, position: int) -> int:
            slow = _slowed
            return read(file, area, position) if slow is None else slow.read(lambda: read(file, area, position))

        RawFile.read = slowed  # type: ignore[method-assign]


def leave_memory(store: ChunkStore, prefetcher: Prefetcher) -> None:
    """Take all chunks out of memory, so that the next prompt reads its own from disk. What is read in the background ends before."""
    for reader in prefetcher.take(prefetcher.coming).values():
        reader.close()
    while prefetcher.leftovers.waiting:
        time.sleep(BREATH)
    tiers = [store.tier(kind.name) for kind in store.tiers if kind.in_memory]
    for key in store.keys_in_memory():
        for tier in tiers:
            tier.remove(key)
    store.settle_memory()  # here, not in the next prompt: no prompt of a server finds all of it gone at once


class OnDisk:
    """Added to vLLM's worker."""

    def leave_memory(self) -> None:
        """See `leave_memory`."""
        engines = _engines()
        leave_memory(engines.store, engines.default.prefetcher)

    def slow_disk(self, rate: float | None) -> None:
        """See `slow_down`."""
        slow_down(rate)

    def disk_speed(self) -> float | None:
        """Bytes a second that the disk has given lately to prompts that waited for it, as the store has measured it, and as the connector decides by it."""
        return cast(ChunkStore, _engines().store).read_speed("disk")


def _engines() -> Any:
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    engines = get_kv_transfer_group().engines  # type: ignore[attr-defined]
    if engines is None:
        raise RuntimeError("this server reuses nothing, so no chunk is read from disk: its log says why.")
    return engines
