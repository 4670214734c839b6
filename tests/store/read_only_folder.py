"""A folder that may only be read, also by root."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest


def make_read_only(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a folder look like a read-only mount to this process, whatever its user may do."""
    for entry in (path, *path.rglob("*")):
        entry.chmod(0o500 if entry.is_dir() else 0o400)
    if os.geteuid() != 0:
        return
    real = os.open
    refused = os.O_WRONLY | os.O_RDWR | os.O_CREAT

    def open_(place: str, flags: int, *args: object, **options: object) -> int:
        if flags & refused and str(place).startswith(str(path)):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(place))
        return real(place, flags, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", open_)
