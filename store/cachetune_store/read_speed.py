"""How fast a tier that isn't in memory has given rows lately to requests that wait for them."""

from __future__ import annotations

import itertools
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable

__all__ = ["ENOUGH", "KEPT", "LONGEST", "PIECE", "REMEMBERED", "ReadSpeed"]

PIECE = 16 << 20
"""Bytes whose reading is timed together: a few reads of long chunks, side by side."""
ENOUGH = 3
"""Fewer pieces say nothing: one of them may have waited for something else."""
KEPT = 33
"""So many of the latest pieces are kept: half a gigabyte, more than the last rows of one long prompt."""
REMEMBERED = 600.0
"""Seconds after which a piece is forgotten."""
LONGEST = 60.0
"""Seconds. A read that takes longer than this says nothing of the speed: a disk that doesn't answer may never end it, and whoever waited has given it up."""


class ReadSpeed:
    """Times reads. Those that threads make side by side share their time: what counts is the time in which any was under way. Safe to use from several threads.

    Args:
        clock: gives seconds that only grow.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._reading: dict[int, float] = {}  # when each read that is under way began
        self._since = 0.0
        self._bytes, self._seconds = 0, 0.0
        self._pieces: deque[tuple[float, float]] = deque(maxlen=KEPT)  # when each ended, and its bytes a second

    def begin(self) -> int:
        """A read begins. Returns its number, for `end`."""
        with self._lock:
            number = next(self._numbers)
            self._reading[number] = self._pass_time()
            return number

    def end(self, number: int, count: int) -> None:
        """A read ends that has given so many bytes."""
        with self._lock:
            now = self._pass_time()
            if now - self._reading.pop(number) > LONGEST:
                return
            self._bytes += count
            if self._bytes >= PIECE and self._seconds > 0:
                self._pieces.append((now, self._bytes / self._seconds))
                self._bytes, self._seconds = 0, 0.0

    @property
    def lately(self) -> float | None:
        """Bytes a second, the median of the latest pieces; None where too little was read lately."""
        with self._lock:
            since = self._clock() - REMEMBERED
            speeds = [speed for ended, speed in self._pieces if ended >= since]
        return statistics.median(speeds) if len(speeds) >= ENOUGH else None

    def _pass_time(self) -> float:
        now = self._clock()
        if self._reading:
            self._seconds += max(0.0, min(now, max(self._reading.values()) + LONGEST) - self._since)
        elif now - self._since > REMEMBERED:  # what was read of a piece before that is forgotten as well
            self._bytes, self._seconds = 0, 0.0
        self._since = now
        return now
