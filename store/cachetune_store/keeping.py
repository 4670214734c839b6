"""Writes chunks that came from a slower tier to a faster one that lasts, behind requests."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable

from .chunk import Chunk
from .errors import StoreError

__all__ = ["Keeper"]

_MOST_WAITING = 256 << 20
"""Bytes of chunks that wait at most. Those beyond are not kept; the slower tier has them."""

_log = logging.getLogger(__name__)


class Keeper:
    """A queue of chunks, and the thread that writes them, which is started by the first one.

    Args:
        write: writes one chunk, if that is still wanted.
    """

    def __init__(self, write: Callable[[Chunk], None]) -> None:
        self._write = write
        self._changed = threading.Condition()
        self._waiting: deque[Chunk] = deque()
        self._bytes = 0
        self._thread: threading.Thread | None = None
        self._closed = False

    def add(self, chunk: Chunk) -> None:
        """Write a chunk, soon. Never waits."""
        with self._changed:
            if self._closed or self._bytes + chunk.host_bytes > _MOST_WAITING:
                return
            self._bytes += chunk.host_bytes
            self._waiting.append(chunk)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="cachetune-keep", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def wait(self) -> None:
        """Return once nothing waits any more."""
        with self._changed:
            self._changed.wait_for(lambda: not self._bytes or self._closed)

    def close(self) -> None:
        """Drop what waits, and return once nothing is written any more."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                chunk = self._waiting.popleft()
            try:
                # A copy that can't be written is no loss: the slower tier has the chunk.
                with contextlib.suppress(StoreError, OSError):
                    self._write(chunk)
            except Exception:  # the thread must go on: others wait for what is behind this chunk
                _log.exception("chunk %s could not be kept in a faster tier; the slower one has it", chunk.key)
            finally:
                with self._changed:
                    self._bytes -= chunk.host_bytes
                    self._changed.notify_all()
