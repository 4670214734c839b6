"""Notes: small records on which all users of a store agree. The first one that is written under a name stays.

Each is a file of its own, so no note is lost with the index, and checks of the chunks don't touch them.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from pathlib import Path

from .arguments import check_kind
from .errors import ErasedChunkError, StoreArgumentError
from .files import TempFiles, make_directory, sync_directory, write_small
from .locks import locked
from .plainfiles import UnfitFileError, open_plain, remove_any
from .printing import shown
from .seals import CHECKSUMS, Seal

__all__ = ["MAX_NOTE", "MAX_NOTE_FILE", "SECRET", "Notes", "file_name", "folder_name", "unwrapped", "wrapped"]

MAX_NOTE = 1 << 20
"""Longest note, in bytes."""
MAX_NOTE_FILE = MAX_NOTE + 1024
"""Longest file of a note, with what the seal adds."""
SECRET = "secret"
"""The kind of notes that are secrets."""
_NAME = re.compile(r"[0-9a-f]{64}")


class Notes:
    """The notes of a store. Each tenant has its own.

    Args:
        directory: where their files are. It is made with the first note. None keeps notes in memory.
        temp: writes the files.
        seal: makes and checks their sums.
        kind: what they are called where they are sealed. "secret": secrets, of which no copy stays when they are set aside. Others are the tenant's own.
    """

    def __init__(
        self, directory: Path | None, temp: TempFiles | None, seal: Seal = CHECKSUMS, *, kind: str = "note"
    ) -> None:
        self._directory = directory
        self.kind = kind
        self._seal = seal
        self._temp = temp
        self._held: dict[tuple[str, str], bytes] = {}
        self._lock = threading.Lock()

    def get(self, tenant: str, name: str) -> bytes | None:
        """The note called `name` (64 hex characters); None if there is none.

        If the file is too long, only its beginning is returned. If it is not a plain file, or was forged, b"" is returned.
        """
        if self._directory is None:
            return self._held.get((tenant, _checked(name)))
        try:
            with os.fdopen(open_plain(self._path(tenant, name)), "rb") as file:
                return unwrapped(self._seal, self.kind, tenant, name, file.read(MAX_NOTE_FILE))
        except FileNotFoundError:
            return None
        except ErasedChunkError:
            # Of a tenant that was deleted; it has come back, or the deletion was cut off.
            with contextlib.suppress(OSError):
                self._path(tenant, name).unlink(missing_ok=True)
            return None
        except UnfitFileError:
            return b""

    def write_first(self, tenant: str, name: str, content: bytes) -> bytes:
        """Write `content` under `name` unless there is a note of that name. Returns the note that is there now, which is durable.

        Raises:
            StoreArgumentError: the name is not a digest, or the content is longer than MAX_NOTE.
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
                self._temp.write(
                    [wrapped(self._seal, self.kind, tenant, name, content)], lambda written: _publish(written, path)
                )
            sync_directory(path.parent)
            return self.get(tenant, name) or content

    def set_aside(self, tenant: str, name: str, content: bytes) -> bool:
        """Set a damaged note aside if its content is still `content`. Its file stays, under another name. Returns whether it was set aside."""
        check_kind(content, bytes, "note", "use bytes")
        if self._directory is None:
            with self._lock:
                return self.get(tenant, name) == content and self._held.pop((tenant, name)) is not None
        path = self._path(tenant, name)
        make_directory(path.parent)
        with locked(self._directory / "lock"):
            if self.get(tenant, name) != content:
                return False
            if self.kind == SECRET:
                path.unlink()
            else:
                path.replace(path.with_suffix(".damaged"))
            sync_directory(path.parent)
            return True

    @property
    def here(self) -> Notes:
        """Those that this machine has."""
        return self

    def get_surely(self, tenant: str, name: str) -> bytes | None:
        """As `get`, but None says that there is no such note anywhere.

        Raises:
            RemoteError, StoreKeyError: the place that machines share can't be asked now.
        """
        return self.get(tenant, name)

    def replace(self, tenant: str, name: str, content: bytes) -> None:
        """Write `content` in the place of a note. Only for secrets that are erased: what others agree on doesn't change."""
        if self._directory is None or self._temp is None:
            with self._lock:
                self._held[tenant, _checked(name)] = content
            return
        path = self._path(tenant, name)
        make_directory(path.parent)
        with locked(self._directory / "lock"):
            write_small(self._temp, path, wrapped(self._seal, self.kind, tenant, name, content))

    def forget(self, tenant: str) -> None:
        """Delete what this machine has of a tenant's notes, because another one has deleted the tenant."""
        self.delete_all(tenant)

    def delete_all(self, tenant: str) -> None:
        """Delete a tenant's notes, also those that were set aside."""
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
        return self._directory / folder_name(self._seal, tenant)

    def _path(self, tenant: str, name: str) -> Path:
        return self._folder(tenant) / file_name(self._seal, name)


def folder_name(seal: Seal, tenant: str) -> str:
    """The folder of a tenant's notes, here or in a place that machines share."""
    return seal.hashed("note", tenant)[:32]


def file_name(seal: Seal, name: str) -> str:
    """The file of a note, here or in a place that machines share."""
    return f"{seal.rehashed('note', _checked(name))}.json"


def wrapped(seal: Seal, kind: str, tenant: str, name: str, content: bytes) -> bytes:
    """A note as it is written, here or in a place that machines share."""
    return seal.wrap(kind, f"{_checked(name)} {tenant}", content, None if kind == SECRET else tenant)


def unwrapped(seal: Seal, kind: str, tenant: str, name: str, raw: bytes) -> bytes:
    """The content of a note; b"" if it is not what the store wrote under this name."""
    content = seal.unwrap(kind, f"{name} {tenant}", raw, None if kind == SECRET else tenant)
    return b"" if content is None else content[: MAX_NOTE + 1]


def _publish(written: Path, path: Path) -> None:
    """Give a written file its name, unless there is a file of that name."""
    try:
        os.link(written, path)
    except FileExistsError:
        raise
    except OSError:
        # The file system has no hard links. The lock keeps others out.
        written.replace(path)


def _checked(name: str) -> str:
    # The name becomes part of a path.
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise StoreArgumentError(f"note name {shown(name)} is not 64 lower-case hex characters; use a SHA-256 in hex")
    return name
