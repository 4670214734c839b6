"""How often a row of work was begun. A row that kills each actor that computes it would otherwise be begun for ever: Ray starts actors anew without end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import ray

from cachetune_rag.errors import CacheTuneError
from cachetune_store.printing import shown

MOST = 3
"""How often a row is begun. A machine that is taken away costs a try as well; run again, the job goes on."""


class Tries:
    """Counts rows that were begun and not done. Lives in an actor of its own, where all workers reach it."""

    def __init__(self) -> None:
        self._begun: Counter[tuple[str, ...]] = Counter()

    def begin(self, ids: Sequence[str]) -> int:
        """Count the beginning of a row. Returns which one it is, 1 for the first."""
        self._begun[tuple(ids)] += 1
        return self._begun[tuple(ids)]

    def done(self, ids: Sequence[str]) -> None:
        """The row is done, so it killed nobody."""
        del self._begun[tuple(ids)]


class RemoteTries:
    """The same in its actor, as workers have it."""

    def __init__(self) -> None:
        self._actor: Any = ray.remote(Tries).options(num_cpus=0).remote()

    def begin(self, ids: Sequence[str]) -> int:
        """See `Tries`."""
        return int(ray.get(self._actor.begin.remote(ids)))

    def done(self, ids: Sequence[str]) -> None:
        """See `Tries`. Nothing is waited for."""
        self._actor.done.remote(ids)


def check(number: int, ids: Sequence[str]) -> None:
    """Refuse a row that was begun too often.

    Raises:
        CacheTuneError: names its documents.
    """
    if number > MOST:
        named = ", ".join(map(shown, ids[:5])) + (f" and {len(ids) - 5} more" if len(ids) > 5 else "")
        raise CacheTuneError(
            f"{MOST} actors, one after the other, died while they computed {'document' if len(ids) == 1 else 'one of the documents'} {named}. "
            "The usual reason is memory: see Ray's log of the dead workers, give an actor more (num_cpus=, a larger machine), or leave the document "
            "out. What is stored stays: run the same again to resume."
        )
