"""Errors of this package that happen in a task or an actor come back in a row, and are raised here as they were there.

Ray wraps what a task raises several times, hands on no more than the text of it, and starts the task again in some cases.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow

import cachetune_rag
import cachetune_store
from cachetune_rag.errors import CacheTuneError
from cachetune_rag.text.files.readers import CorpusError
from cachetune_store import StoreError

OURS = (CacheTuneError, StoreError)
TYPE = pyarrow.struct([("kind", pyarrow.string()), ("message", pyarrow.string())])
"""The column `error` of all rows; None: there is none."""


def told(error: CacheTuneError | StoreError) -> dict[str, str]:
    """An error as a value of this column."""
    return {"kind": type(error).__name__, "message": str(error)}


def check(row: Mapping[str, Any]) -> None:
    """Raise the error that a row brings, if it does.

    Raises:
        CacheTuneError, StoreError: as it was raised where the row was made.
    """
    error = row.get("error")
    if error is not None:
        raise _kind(error["kind"])(error["message"])


def _kind(name: str) -> type[Exception]:
    """The class of an error by its name; the package's base class, if it is one that a user can't import."""
    for module in (cachetune_rag, cachetune_store):
        found = getattr(module, name, None)
        if isinstance(found, type) and issubclass(found, OURS):
            return found
    return CorpusError if name == CorpusError.__name__ else CacheTuneError
