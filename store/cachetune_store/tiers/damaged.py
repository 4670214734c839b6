"""Damaged files, of which the newest are kept, so that their damage can be examined."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from ..files import make_directory
from ..plainfiles import remove_any

__all__ = ["DamagedFiles"]

_LIMIT_FILES = 16
_LIMIT_BYTES = 1 << 30


class DamagedFiles:
    """A directory of damaged files: at most the newest 16, and at most 1 GiB (or the disk budget, if that is less)."""

    def __init__(self, directory: Path, *, limit_bytes: int) -> None:
        self._directory = directory
        self._limit_bytes = min(limit_bytes, _LIMIT_BYTES)

    def take(self, path: Path) -> bool:
        """Move `path` here. Returns False if there is no such file."""
        make_directory(self._directory)
        try:
            path.replace(self._directory / f"{time.time_ns():020d}-{path.stem}{path.suffix}")
        except FileNotFoundError:
            return False
        self._trim()
        return True

    def remove(self, name: str) -> None:
        """Delete files that were called `name`, whatever their ending."""
        with contextlib.suppress(FileNotFoundError):
            for path in list(self._directory.iterdir()):
                if f"-{name}." in path.name:
                    remove_any(path)

    def _trim(self) -> None:
        total = 0
        # Names begin with the time, so the newest files come first.
        for count, path in enumerate(sorted(self._directory.iterdir(), reverse=True), start=1):
            try:
                total += path.lstat().st_size
            except FileNotFoundError:
                continue
            if count > _LIMIT_FILES or total > self._limit_bytes:
                remove_any(path)
