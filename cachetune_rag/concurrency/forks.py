"""Notices when an object that has threads is used in a process that was forked after the object was made.

Only the thread that forks goes on in the child. Locks that other threads held stay locked there for ever, and work that they were to do is
never done. So an object that has threads can't be used in the child: it has to be made anew there (gunicorn's `post_fork`, or "spawn").
"""

from __future__ import annotations

import os

from cachetune_rag.errors import ForkedError


class Origin:
    """The process that an object was made in."""

    def __init__(self) -> None:
        self._pid = os.getpid()

    @property
    def here(self) -> bool:
        """Whether it is the running process."""
        return self is _this

    def check(self, what: str = "the engine", left: str = "its threads and its store stayed there") -> None:
        """Refuse to go on in another process.

        Args:
            what: what was made in this one, for the message.
            left: what it can't do without in another, for the message.

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
    """The running process."""
    return _this


def _forked() -> None:
    global _this
    _this = Origin()


if hasattr(os, "register_at_fork"):  # not where there is no fork
    os.register_at_fork(after_in_child=_forked)
