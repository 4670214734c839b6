"""Whether this process is the one that something was made in, or was forked off it since.

Of all threads only the one that forks goes on in the child. What the others held stays locked there for ever, and what they were to do
is never done. So nothing that has threads can be used on; it has to be made anew (gunicorn's `post_fork`, or "spawn").
"""

from __future__ import annotations

import os

from cachetune_rag.errors import ForkedError


class Origin:
    """A process, as what was made in it knows it."""

    def __init__(self) -> None:
        self._pid = os.getpid()

    @property
    def here(self) -> bool:
        """Whether it is the one that runs."""
        return self is _this

    def check(self, what: str = "the engine", left: str = "its threads and its store stayed there") -> None:
        """Raise where it isn't.

        Args:
            what: was made here.
            left: what it can't do without.

        Raises:
            ForkedError: says what to do.
        """
        if not self.here:
            raise ForkedError(
                f"{what} was made in process {self._pid}, which this one ({os.getpid()}) was forked off: {left}. "
                f"Make one in each process, behind the fork: in gunicorn's post_fork, or in the app's own start "
                "without --preload; with multiprocessing, in the child, or start it by 'spawn'."
            )


_this = Origin()


def this_process() -> Origin:
    """The process that runs now."""
    return _this


def _forked() -> None:
    global _this
    _this = Origin()


if hasattr(os, "register_at_fork"):  # not where there is no fork
    os.register_at_fork(after_in_child=_forked)
