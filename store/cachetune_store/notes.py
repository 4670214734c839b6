"""Notes: small records that all users of a store agree on. Whoever writes a name first, wins.

They are files of their own, so a lost index costs none, and no check of the chunks touches them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import threading
from pathlib import Path

from .arguments import check_kind
from .errors import StoreArgumentError
from .files import TempFiles, make_directory, sync_directory
from .locks import locked
from .plainfiles import UnfitFileError, open_plain, remove_any
from .printing import shown

__all__ = ["MAX_NOTE", "Notes"]

MAX_NOTE = 1 << 20
"""Longest note, in bytes."""
_NAME = re.compile(r"[0-9a-f]{64}")


class Notes:
    """The notes of a store, apart for each tenant.

    Args:
        directory: where their files are, made when there is one to write; None keeps them in memory.
        temp: writes those files.
    """

    def __init__(self, directory: Path | None, temp: TempFiles | None) -> None:
        self._directory = directory
        self._temp = temp
        self._held: dict[tuple[str, str], bytes] = {}
        self._lock = threading.Lock()

    def get(self, tenant: str, name: str) -> bytes | None:
        """What stands under `name` (64 hex characters); None if nothing does.

        A file that is too long comes back cut, and what is no plain file as b"".
        """
        if self._directory is None:
            return self._held.get((tenant, _checked(name)))
        try:
            with os.fdopen(open_plain(self._path(tenant, name)), "rb") as file:
                return file.read(MAX_NOTE + 1)
        except FileNotFoundError:
            return None
        except UnfitFileError:
            return b""

    def settle(self, tenant: str, name: str, content: bytes) -> bytes:
        """Write `content` under `name` unless something stands there already; returns what stands there now, durably.

        Raises:
            StoreArgumentError: the name is no digest, or the content longer than MAX_NOTE.
        """
        check_kind(content, bytes, "note", "use bytes")
        if len(content) > MAX_NOTE:
            raise StoreArgumentError(f"note has {len(content)} bytes; at most {MAX_NOTE} can be stored")
        if self._directory is None or self._temp is None:
            with self._lock:
                return self._held.setdefault((tenant, _checked(name)), content)
        path = self._path(tenant, name)
        make_directory(path.parent)
        with locked(self._directory / "lock"):
            if (known := self.get(tenant, name)) is not None:
                return known
            with contextlib.suppress(FileExistsError):
                self._temp.write([content], lambda written: _publish(written, path))
            sync_directory(path.parent)
            return self.get(tenant, name) or content

    def set_aside(self, tenant: str, name: str, content: bytes) -> bool:
        """Take away a damaged note, if it still reads `content`; its file stays beside, under another name."""
        check_kind(content, bytes, "note", "use bytes")
        if self._directory is None:
            with self._lock:
                return self.get(tenant, name) == content and self._held.pop((tenant, name)) is not None
        path = self._path(tenant, name)
        make_directory(path.parent)
        with locked(self._directory / "lock"):
            if self.get(tenant, name) != content:
                return False
            path.replace(path.with_suffix(".damaged"))
            sync_directory(path.parent)
            return True

    def delete_all(self, tenant: str) -> None:
        """Delete a tenant's notes, and what was set aside of them."""
        if self._directory is None:
            with self._lock:
                self._held = {place: content for place, content in self._held.items() if place[0] != tenant}
            return
        folder = self._folder(tenant)
        if folder.is_dir():
            with locked(self._directory / "lock"):
                for path in folder.iterdir():
                    remove_any(path)
                sync_directory(folder)

    def _folder(self, tenant: str) -> Path:
        assert self._directory is not None
        return self._directory / hashlib.sha256(tenant.encode("utf-8", "surrogatepass")).hexdigest()[:32]

    def _path(self, tenant: str, name: str) -> Path:
        return self._folder(tenant) / f"{_checked(name)}.json"


def _publish(written: Path, path: Path) -> None:
    """Give a written file its name, unless another has it."""
    try:
        os.link(written, path)
    except FileExistsError:
        raise
    except OSError:
        # No hard links here: the lock is what keeps others out.
        written.replace(path)


def _checked(name: str) -> str:
    # The name becomes a path.
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise StoreArgumentError(f"note name {shown(name)} is not 64 lower-case hex characters; use a SHA-256 in hex")
    return name
