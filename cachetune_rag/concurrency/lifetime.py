"""Whether an engine may still be used: it ends when it is closed, and it belongs to the process that made it."""

from __future__ import annotations

from cachetune_rag.concurrency.forks import this_process
from cachetune_rag.errors import EngineClosedError


class Lifetime:
    """Whether an engine is open, and in which process it was made.

    Attributes:
        closed: whether the engine was closed.
    """

    def __init__(self) -> None:
        self._origin = this_process()
        self.closed = False

    @property
    def here(self) -> bool:
        """Whether the engine was made in the running process, and not in one that it was forked from."""
        return self._origin.here

    def check_process(self) -> None:
        """Refuse use in a process that was forked after the engine was made.

        Raises:
            ForkedError: the engine belongs to the parent process.
        """
        self._origin.check()

    def check(self) -> None:
        """Refuse use after the engine was closed, or in another process.

        Raises:
            EngineClosedError: the engine is closed.
            ForkedError: the engine belongs to the parent process.
        """
        self._origin.check()
        if self.closed:
            raise EngineClosedError("the engine is closed: make a new one.")

    def end(self) -> bool:
        """Mark the engine as closed. Returns False if it was closed already. The caller makes sure that no two threads do this at once."""
        ended, self.closed = not self.closed, True
        return ended
