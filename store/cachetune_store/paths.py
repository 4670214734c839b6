"""The folder of a store: where it is, which is found out once, when the store is opened; and what belongs into it."""

from __future__ import annotations

import os
import re
from pathlib import Path

from .errors import StorePathError
from .printing import shown

__all__ = ["DESCRIPTION", "is_store", "other_files", "store_path"]

DESCRIPTION = "store.json"
"""The file that makes a folder a store."""
_PARTS = {"chunks", "documents", "notes", "secrets", "tmp", "index", "damaged", "profiles", DESCRIPTION}
_PARTS |= {"lock", "index.lock", "claims.lock"}

_VARIABLE = re.compile(r"\$(\w+|\{[^}]*\})")


def store_path(given: object) -> Path:
    """The absolute path of `given`. ~ and $VARIABLES are replaced as by a shell, and a relative path begins at the current directory.

    So a store stays the same if the current directory or the environment change later.

    Raises:
        StorePathError: it is empty, or names a home directory or a variable that doesn't exist.
    """
    if not isinstance(given, str | os.PathLike):
        raise StorePathError(f"store path is {shown(given)}, a {type(given).__name__}; use a string or a path, or None")
    text = os.fsdecode(given)
    if not text or "\0" in text:
        raise StorePathError(
            f"store path {shown(text)} names no folder; give the path of one, or None for a store in memory"
        )
    try:
        path = os.path.expandvars(Path(text).expanduser())
    except RuntimeError as error:
        raise StorePathError(
            f"store path {shown(text)} names a home directory that there isn't; write the folder's whole path"
        ) from error
    unset = _VARIABLE.search(path)
    if unset is not None and not Path(path).exists():
        raise StorePathError(
            f"store path {shown(text)} names {unset.group()}, which is not set in the environment; set it first"
        )
    return Path(path).absolute()


def is_store(path: Path | str) -> bool:
    """Whether there is a store in the folder `path`. Whether it can be used, opening it tells."""
    return Path(path, DESCRIPTION).is_file()


def other_files(path: Path | str) -> list[str]:
    """Names of what lies in the folder `path` and belongs to no store; empty if there is no such folder."""
    folder = Path(path)
    return sorted({entry.name for entry in folder.iterdir()} - _PARTS) if folder.is_dir() else []
