"""The commands of the command line, one file each. Nothing heavy is imported before a command runs."""

from typing import Any


def __getattr__(name: str) -> Any:
    """`main` had its place here: scripts that an earlier release installed look for it."""
    if name != "main":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from cachetune_rag.cli.app import main

    return main
