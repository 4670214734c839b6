"""Records of the index that stay when it is made anew, in a file for as long as there is no index that holds them."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .errors import IndexDamagedError, StoreError
from .plainfiles import UnfitFileError, read_plain, remove_any
from .records import checked
from .seals import Seal

__all__ = ["KeptRecords"]

_MOST = 1 << 30

_log = logging.getLogger(__name__)


class KeptRecords:
    """Takes records out of an old index, and gives them to the new one.

    Args:
        file: where they are meanwhile. A process that is killed then leaves it for the next one that makes the index.
        seal: makes and checks the file's sum.
    """

    def __init__(self, file: Path, seal: Seal) -> None:
        self._file, self._seal = file, seal

    def take(self, names: Callable[[], Iterable[str]], get: Callable[[str], Any], *, whole: bool) -> dict[str, Any]:
        """The records that the old index still gives, and those that a killed process has left.

        Args:
            whole: the old index is one that was filled. What is left in the file is older then, and may be done since.
            names: names of the records in the old index.
            get: a record of it; None if it isn't there any more.

        Raises:
            OSError: they can't be written to the file. The old index must stay then.
        """
        found = {} if whole else self._left()
        lost: StoreError | None = None
        try:
            for name in names():
                try:
                    record = get(name)
                except IndexDamagedError as error:
                    lost = error
                    continue
                if record is not None:
                    found[name] = record
        except StoreError as error:
            lost = error
        if lost is not None:
            _log.warning(
                "%s. If the store has a remote tier: what changed here while that could not be reached may not be told to other machines; "
                "precompute or remove it again",
                lost,
            )
        if found:
            self._write(self._seal.stamp("kept", "", json.dumps(found)).encode())
        return found

    def drop(self) -> None:
        """The new index holds the records."""
        with contextlib.suppress(FileNotFoundError):
            self._file.unlink()

    def _left(self) -> dict[str, Any]:
        try:
            text = self._seal.unstamp("kept", "", read_plain(self._file, _MOST).decode())
            if text is None:
                return {}  # it was not finished, so the old index was still there
            return {name: checked(name, record) for name, record in json.loads(text).items()}
        except (OSError, UnfitFileError, ValueError, AttributeError, RecursionError, StoreError):
            return {}

    def _write(self, content: bytes) -> None:
        if os.path.lexists(self._file):
            remove_any(self._file)
        fd = os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
