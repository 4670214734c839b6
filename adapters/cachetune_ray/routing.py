"""Which replica a request goes to: where most of its chunks are in host memory, as long as that replica isn't asked much more than the others.

Nothing here knows Ray; `router.py` asks it.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import numpy as np

from cachetune_rag.checking.arguments import is_number
from cachetune_rag.errors import ConfigError
from cachetune_ray.sketch import Samples, Sketch
from cachetune_store.printing import shown

SPREAD = 1.25
SETTLE_SECONDS = 10.0
_MOST_SENT = 512


@dataclass
class _Replica:
    """What is known of a replica.

    Attributes:
        version: of its sketch, as it was published.
        sketch: of the chunks in its host memory; None: it has published none yet.
        published: when that came.
        sent: hashes of requests that it was sent lately, each with the time.
        lately: how many of these requests had each hash.
        total: requests that it was sent.
    """

    version: object = None
    sketch: Sketch | None = None
    published: float = -math.inf
    sent: deque[tuple[float, list[int]]] = field(default_factory=deque)
    lately: Counter[int] = field(default_factory=Counter)
    total: int = 0

    def forget(self, before: float) -> None:
        """Forget what was sent before a time, and what is too much."""
        while self.sent and (self.sent[0][0] < before or len(self.sent) > _MOST_SENT):
            for sample in self.sent.popleft()[1]:
                self.lately[sample] -= 1
                if not self.lately[sample]:
                    del self.lately[sample]


class ChunkRouting:
    """Ranks replicas for requests.

    A replica is known by the sketch that it publishes every few seconds. What it was sent since counts as well, since the chunks of these requests are in its memory
    before it has said so. A replica whose load is above `spread` times the mean comes behind all that are below: that is consistent hashing's bound on loads
    (Mirrokni, Thorup and Zadimoghaddam, 2018), with the chunks in memory in place of the hash.

    Args:
        spread: how many times the mean load a replica may have to be preferred; above 1.
        settle: seconds for which what was sent counts without a sketch that has it.
        clock: gives the time.

    Raises:
        ConfigError: an argument is out of range.
    """

    def __init__(
        self, *, spread: float = SPREAD, settle: float = SETTLE_SECONDS, clock: Callable[[], float] = time.monotonic
    ):
        if not is_number(spread) or not spread > 1:
            raise ConfigError(f"spread is {shown(spread)}: use a number above 1 (default: {SPREAD}).")
        if not is_number(settle) or settle < 0:
            raise ConfigError(f"settle is {shown(settle)}: use seconds, 0 or more (default: {SETTLE_SECONDS}).")
        self._spread, self._settle, self._clock = spread, settle, clock
        self._replicas: dict[str, _Replica] = {}

    def keep(self, replicas: Collection[str]) -> None:
        """Forget all replicas but these."""
        self._replicas = {name: self._replicas.get(name) or _Replica() for name in replicas}

    def published(self, replica: str, version: object, sketch: bytes) -> None:
        """A replica has said which chunks its host memory has. The same version again changes nothing."""
        known = self._of(replica)
        if version != known.version:
            # What was sent before the last sketch has had the time between the two to show in this one.
            known.forget(known.published)
            known.version, known.sketch, known.published = version, Sketch.from_bytes(sketch), self._clock()

    def sent(self, replica: str, samples: Samples) -> None:
        """A request with these hashes went to a replica."""
        known = self._of(replica)
        known.total += 1
        if len(samples):
            known.sent.append((self._clock(), samples.tolist()))
            known.lately.update(known.sent[-1][1])

    def found(self, replica: str, samples: Samples) -> int:
        """How many of a request's hashes a replica is thought to have in memory."""
        known = self._of(replica)
        known.forget(self._clock() - self._settle)
        has = np.zeros(len(samples), bool) if known.sketch is None else known.sketch.known(samples)
        if known.lately:
            has |= np.fromiter((sample in known.lately for sample in samples.tolist()), bool, len(samples))
        return int(has.sum())

    def rank(self, samples: Samples, loads: Mapping[str, int]) -> list[str]:
        """The replicas, best first.

        Args:
            samples: the request's hashes.
            loads: requests that each replica is answering or has waiting.
        """
        if not loads:
            return []
        bound = math.ceil(self._spread * (sum(loads.values()) + 1) / len(loads))

        def place(replica: str) -> tuple[bool, int, int, int, str]:
            load = loads[replica]
            full = load >= bound
            # Among those that are asked too much, load alone counts.
            found = 0 if full else self.found(replica, samples)
            return full, -found, load, self._of(replica).total, replica

        return sorted(loads, key=place)

    def _of(self, replica: str) -> _Replica:
        return self._replicas.setdefault(replica, _Replica())
