"""Fills host memory with chunks that are likely to be asked for, before anybody asks."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from functools import partial

from cachetune_rag.readahead.prefetcher import Prefetcher
from cachetune_store import ChunkKey, ChunkStore, StoreClosedError, StoreError

_log = logging.getLogger(__name__)
_AT_ONCE = 8
"""Chunks that are read together. Few, because all of them are open meanwhile."""


class Warming:
    """Reads chunks into host memory on a thread of its own, as long as there is free room: nothing has to make room for them.

    Args:
        store: where they come from.
        prefetcher: reads them. Requests go first, and take over what is being read.
        keys: the chunks, the most wanted first. Those that aren't stored any more are passed over.
    """

    def __init__(self, store: ChunkStore, prefetcher: Prefetcher, keys: Sequence[ChunkKey]):
        self._store, self._prefetcher, self._keys = store, prefetcher, keys
        self.chunks = self.bytes = 0
        self._thread = threading.Thread(target=self._run, name="cachetune-warming", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether it is still reading."""
        return self._thread.is_alive()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it has ended, at most `timeout` seconds. Gives whether it has ended."""
        self._thread.join(timeout)
        return not self.running

    def _run(self) -> None:
        try:
            for start in range(0, len(self._keys), _AT_ONCE):
                wanted = self._fitting(self._keys[start : start + _AT_ONCE])
                if wanted is None or self._prefetcher.closing:
                    break
                read = self._prefetcher.fetch(partial(list, wanted))
                read.wait()
                self.bytes += read.bytes
                self.chunks += sum(self._store.touch_host(key) > 0 for key in wanted)
            for key in reversed(self._keys):  # the most wanted is to be evicted last
                self._store.touch_host(key)
        except StoreClosedError:
            pass
        except StoreError as error:
            _log.warning("filling memory ended after %s chunks: %s", self.chunks, error)

    def _fitting(self, keys: Sequence[ChunkKey]) -> list[ChunkKey] | None:
        """Those of the chunks for which there is free room; None if there is none any more."""
        host = self._store.stats().host
        free = host.budget - host.bytes
        sizes = {key: 0 if self._store.touch_host(key) else self._store.size_of(key) for key in keys}
        fitting: list[ChunkKey] = []
        for key in (key for key, size in sizes.items() if size):
            free -= sizes[key]
            if free < 0:
                break
            fitting.append(key)
        return None if free < 0 and not fitting else fitting
