"""Which chunks each replica has in memory, kept where it outlives the replicas: a new one begins with what a lost one had."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

_MOST_LOST = 64
"""Lost replicas whose chunks are remembered."""


@dataclass
class _Told:
    """What a replica has told: its chunks, the one used last first, and when it last told anything."""

    keys: Sequence[str]
    at: float


class Memories:
    """What the replicas of an application told of their memory. A deployment of its own; if it dies, they tell it again.

    Args:
        silent: seconds without a word after which a replica counts as lost.
        clock: gives the time.
    """

    def __init__(self, silent: float, clock: Callable[[], float] = time.monotonic):
        self._silent, self._clock = silent, clock
        self._told: dict[str, _Told] = {}

    def tell(self, replica: str, keys: Sequence[str] | None) -> bool:
        """A replica is there, and has these chunks; None: the same as before. Returns whether that is known: if not, it has to tell them."""
        known = self._told.get(replica)
        if keys is None and known is None:
            return False
        self._told[replica] = _Told(known.keys if keys is None and known is not None else keys or (), self._clock())
        return True

    def wanted(self, replica: str) -> list[str]:
        """The chunks that a new replica should read into its memory, the most wanted first.

        Those of a replica that is lost come first, and no second new one gets them. Then the ones that the others used last.
        """
        now = self._clock()
        lost = sorted((name for name, told in self._told.items() if now - told.at > self._silent), key=self._since)
        for name in lost[:-_MOST_LOST]:
            del self._told[name]
        mine = self._told.pop(lost[-1]).keys if lost else ()
        others = [told.keys for name, told in self._told.items() if name != replica and name not in lost]
        in_turns = (key for place in zip_longest(*others) for key in place if key is not None)
        return list(dict.fromkeys([*mine, *in_turns]))

    def _since(self, name: str) -> float:
        return self._told[name].at
