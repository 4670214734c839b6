"""The commands of the command line, one file each. Nothing heavy is imported before a command runs."""

from __future__ import annotations

from collections.abc import Sequence

from cachetune_rag.cli.interrupts import end_at_once, instant_interrupt, sigterm_as_interrupt


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit, as `cachetune_rag.cli.app.main`. Ctrl-C and SIGTERM end it without a traceback from here on.

    Args:
        arguments: the words behind the program's name; None: those of this process.
    """
    with instant_interrupt():
        from cachetune_rag.cli.app import main as run
    try:
        with sigterm_as_interrupt():
            run(arguments)
    finally:
        end_at_once()  # the command is done, and Python only clears up
