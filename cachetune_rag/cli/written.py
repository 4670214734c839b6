"""Files that commands write: whole, or not there at all."""

from __future__ import annotations

import os
from pathlib import Path

from cachetune_rag.cli.console import UsageError


def check_writable(path: Path, option: str) -> None:
    """Refuse a file that can't be written, before anything is computed for it.

    Raises:
        UsageError: its folder is missing, or it is a folder.
    """
    if not path.parent.is_dir() or path.is_dir():
        raise UsageError(f"{option} {path} can't be written: name a file in a folder that exists.")


def write_whole(path: Path, content: bytes) -> None:
    """Write a file, in place of one that may be there."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
