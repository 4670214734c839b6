"""Where a store lies: settled once, when it is opened."""

from __future__ import annotations

import os
import re
from pathlib import Path

from .errors import StorePathError
from .printing import shown

__all__ = ["store_path"]

_VARIABLE = re.compile(r"\$(\w+|\{[^}]*\})")


def store_path(given: object) -> Path:
    """The absolute path that `given` names: with ~ and $VARIABLES filled in, as a shell would, and from the current directory.

    All files of a store are named from it, so it stays the same store whatever the current directory or the environment become.

    Raises:
        StorePathError: it names a home directory or a variable that there isn't, or is empty.
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
