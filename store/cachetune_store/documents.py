"""Documents: which chunks each one holds, and how many documents hold each chunk.

The index answers; each document is also a small JSON file, so that a lost index costs no document. File and record
names are hashes of tenant and id, which may be any strings.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .errors import StoreError, UnknownDocumentError
from .files import TempFiles, make_directory, sync_directory, unreadable, write_small
from .index import Index
from .keys import ChunkKey
from .plainfiles import files_below, read_plain
from .printing import shown
from .removals import Removals
from .seals import CHECKSUMS, Seal

__all__ = ["Documents"]

MAX_DOCUMENT = 64 << 20
"""Longest file of a document, in bytes, that is written, or read at all: about 900,000 chunks."""

_log = logging.getLogger(__name__)
Free = Callable[[Sequence[ChunkKey]], int]


class Documents:
    """The document book of a store.

    Args:
        index: where records and reference counts are.
        directory: where the documents' files are; None for a store in memory.
        temp: writes those files.
        removals: told of documents that are removed or replaced.
        seal: makes and checks the files' sums.
    """

    def __init__(
        self,
        index: Index,
        directory: Path | None,
        temp: TempFiles | None,
        removals: Removals,
        seal: Seal = CHECKSUMS,
    ) -> None:
        self._index = index
        self._directory = directory
        self._temp = temp
        self._removals = removals
        self._seal = seal

    def put(self, tenant: str, doc_id: str, keys: Sequence[ChunkKey], free: Free, *, shared: bool = False) -> None:
        """Put or replace a document, and free the chunks that no document holds any more.

        Args:
            tenant, doc_id: which one.
            keys: its chunks.
            free: unused chunks go there.
            shared: it is what machines agree on in a shared place, which can always say it again. So it gets no file, whose
                writing would take far longer than all else of it.
        """
        digests = [key.digest for key in keys]
        with self._changing(), self._index.transaction():
            old = set((self._index.get(self._record_name(tenant, doc_id)) or {"chunks": []})["chunks"])
            # Also where the chunks are the same: chunks that requests are about to add to the document are not among them.
            self._removals.note(tenant, doc_id, gone=not old <= set(digests))
            self._replace(tenant, doc_id, digests, free, shared)

    def extend(
        self,
        tenant: str,
        doc_id: str,
        keys: Sequence[ChunkKey],
        free: Free,
        since: int | None = None,
        *,
        shared: bool = False,
    ) -> bool:
        """Add chunks behind those that a document holds, but for those it holds already; make it if there is none.

        Args:
            tenant, doc_id: which one.
            keys: the chunks.
            free: unused chunks go there.
            since: if the document was removed or replaced after this number, nothing is added.
            shared: as for `put`.

        Returns:
            Whether the document holds the chunks now.
        """
        added = [key.digest for key in keys]
        with self._changing(), self._index.transaction():
            record = self._index.get(self._record_name(tenant, doc_id))
            held: list[str] = [] if record is None else record["chunks"]
            known = set(held)
            new = [digest for digest in dict.fromkeys(added) if digest not in known]
            if since is not None and self._removals.since(since, tenant, doc_id):
                return record is not None and not new
            if new or record is None:
                self._replace(tenant, doc_id, held + new, free, shared)
            return True

    def _replace(self, tenant: str, doc_id: str, digests: list[str], free: Free, shared: bool) -> None:
        """Write a document's record and file, and count its chunks; inside a transaction."""
        name = self._record_name(tenant, doc_id)
        record = {"id": doc_id, "tenant": tenant, "chunks": digests}
        content = self._encode(record)
        if len(content) > MAX_DOCUMENT:
            raise StoreError(
                f"document {shown(doc_id)} has {len(digests)} chunks; its record takes {len(content)} bytes of {MAX_DOCUMENT} "
                "allowed: split it into several documents"
            )
        old = self._index.get(name) or {"chunks": []}
        self._index.set(name, record | {"shared": True} if shared else record)
        free(self._count(set(digests) - set(old["chunks"]), set(old["chunks"]) - set(digests)))
        if self._directory is not None and self._temp is not None:
            path = self._path(tenant, doc_id)
            if shared:
                self._drop_file(tenant, doc_id)
                return
            make_directory(path.parent)
            write_small(self._temp, path, content)

    def delete(self, tenant: str, doc_id: str, free: Free) -> int:
        """Drop a document, and free the chunks that no document holds any more; what `free` says of them.

        The document's file goes last: if anything fails before, the document is still there to be deleted.

        Raises:
            UnknownDocumentError: there is no such document.
        """
        name = self._record_name(tenant, doc_id)
        with self._changing(), self._index.transaction():
            # Of one that isn't known, a request may be about to make it known.
            self._removals.note(tenant, doc_id)
            record = self._index.get(name)
            if record is None:
                raise UnknownDocumentError(
                    f"no document {shown(doc_id)} of tenant {shown(tenant)}; documents() lists those there are"
                )
            self._index.delete(name)
            freed = free(self._count(set(), set(record["chunks"])))
            if self._directory is not None:
                path = self._path(tenant, doc_id)
                path.unlink(missing_ok=True)
                if path.parent.is_dir():
                    sync_directory(path.parent)
            return freed

    def of(self, tenant: str) -> Iterator[tuple[str, tuple[ChunkKey, ...]]]:
        """Ids and chunks of a tenant's documents."""
        for _, record in self._index.items(f"doc/{self._hash(tenant)}/"):
            yield record["id"], tuple(ChunkKey(digest) for digest in record["chunks"])

    def holders(self, tenant: str, keys: Sequence[ChunkKey]) -> list[str]:
        """Ids of a tenant's documents that hold one of these chunks; reads all of its records, if any document holds one."""
        wanted = {key.digest for key in keys if self.holds(key)}
        if not wanted:
            return []
        return [
            record["id"]
            for _, record in self._index.items(f"doc/{self._hash(tenant)}/")
            if not wanted.isdisjoint(record["chunks"])
        ]

    def holds(self, key: ChunkKey) -> bool:
        """Whether any document holds a chunk."""
        return self._index.get(f"ref/{key.digest}") is not None

    def free_unheld(self, key: ChunkKey, free: Free) -> bool:
        """Free a chunk that no document holds; whether that was so."""
        with self._index.transaction():
            if self.holds(key):
                return False
            free([key])
            return True

    def by_tenant(self) -> Counter[str]:
        """How many documents each tenant has."""
        return Counter(record["tenant"] for _, record in self._index.items("doc/"))

    def chunks_of(self, tenant: str, doc_id: str) -> list[ChunkKey] | None:
        """The chunks of a document; None if there is no such document."""
        record = self._index.get(self._record_name(tenant, doc_id))
        return None if record is None else [ChunkKey(digest) for digest in record["chunks"]]

    def shared(self) -> list[tuple[str, str]]:
        """Tenant and id of every document that a shared place knows."""
        return [(record["tenant"], record["id"]) for _, record in self._index.items("doc/") if record.get("shared")]

    def mark_shared(self, tenant: str, doc_id: str) -> None:
        """A shared place knows of a document, too. It can always say it again, so the document has no file from now on.

        If the index were lost, a file would bring back what was removed elsewhere meanwhile.
        """
        record = self._index.get(self._record_name(tenant, doc_id))
        if record is not None and not record.get("shared"):
            self._index.set(self._record_name(tenant, doc_id), record | {"shared": True})
            self._drop_file(tenant, doc_id)

    def count(self) -> int:
        """Documents of all tenants."""
        return self._index.count("doc/")

    def rebuild(self) -> int:
        """Fill records from the files (where there are files), and count the references anew.

        A file that is damaged is written again if the index still knows the document, and else passed over. One that can't be read now is
        passed over, too, but stays as it is.

        Returns:
            How many documents are not known because their files can't be read now.
        """
        skipped = 0
        with self._index.transaction():
            if self._directory is not None and self._temp is not None:
                skipped = self._fill(self._directory, self._temp)
            for name in list(self._index.names("ref/")):
                self._index.delete(name)
            counts: dict[str, int] = {}
            for _, record in self._index.items("doc/"):
                for digest in set(record["chunks"]):
                    counts[digest] = counts.get(digest, 0) + 1
            for digest, count in counts.items():
                self._index.set(f"ref/{digest}", count)
        return skipped

    def _fill(self, directory: Path, temp: TempFiles) -> int:
        known = dict(self._index.items("doc/"))
        damaged: set[Path] = set()
        unread: dict[Path, OSError] = {}
        for path in files_below(directory, ".json"):
            try:
                record = self._read(path)
            except FileNotFoundError:
                continue
            except OSError as error:
                unread[path] = error
                continue
            if record is None:
                damaged.add(path)
                continue
            name = self._record_name(record["tenant"], record["id"])
            held = known.pop(name, {})
            if {field: held.get(field) for field in record} != record:
                self._index.set(name, record)
        for name, record in known.items():
            path = self._path(record["tenant"], record["id"])
            if record.get("shared") and path not in damaged:
                continue  # the shared place has it
            if path in unread:
                del unread[path]  # what the index says stays
                continue
            if path in damaged:
                damaged.remove(path)
                write_small(temp, path, self._encode(record))
            else:
                self._index.delete(name)
        for path in damaged:
            _log.warning("%s is damaged, so its document is not known any more: index it again", path)
        for path, reason in unread.items():
            _log.warning(
                "%s; until then its document is not known. It is read again when the store is next opened",
                unreadable(reason, path),
            )
        return len(unread)

    def _changing(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self._temp is None else self._temp.changing()

    def _count(self, added: set[str], removed: set[str]) -> list[ChunkKey]:
        """Adjust reference counts; the chunks whose count fell to 0."""
        for digest in added:
            self._index.set(f"ref/{digest}", (self._index.get(f"ref/{digest}") or 0) + 1)
        free = []
        for digest in sorted(removed):
            left = (self._index.get(f"ref/{digest}") or 0) - 1
            if left > 0:
                self._index.set(f"ref/{digest}", left)
            else:
                self._index.delete(f"ref/{digest}")
                free.append(ChunkKey(digest))
        return free

    def _drop_file(self, tenant: str, doc_id: str) -> None:
        """Delete a document's file, if there is one."""
        if self._directory is not None and (path := self._path(tenant, doc_id)).exists():
            path.unlink(missing_ok=True)
            sync_directory(path.parent)

    def _path(self, tenant: str, doc_id: str) -> Path:
        assert self._directory is not None
        return self._place(self._directory, tenant, doc_id)

    def _encode(self, record: dict[str, Any]) -> bytes:
        return self._seal.hide("document", "", json.dumps(record | {"checksum": self._sum(record)}).encode())

    def _read(self, path: Path) -> dict[str, Any] | None:
        """The document in a file; None if it is damaged or no document.

        Raises:
            OSError: the file can't be read.
        """
        try:
            record = json.loads(self._seal.reveal("document", "", read_plain(path, MAX_DOCUMENT)) or b"")
            digests = [ChunkKey(digest).digest for digest in record["chunks"]]
            found = {"id": record["id"], "tenant": record["tenant"], "chunks": digests}
            # Files of the first release, which had no keys, have no checksum.
            none = self._sum(found) if self._seal is CHECKSUMS else ""
            sound = hmac.compare_digest(record.get("checksum", none).encode(), self._sum(found).encode())
            return found if sound and path == self._place(path.parents[1], found["tenant"], found["id"]) else None
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None

    def _sum(self, record: dict[str, Any]) -> str:
        text = json.dumps([record["id"], record["tenant"], record["chunks"]])
        return self._seal.record("document", "", text.encode())  # the text begins with the document's name

    def _record_name(self, tenant: str, doc_id: str) -> str:
        return f"doc/{self._hash(tenant)}/{self._hash(doc_id)}"

    def _place(self, directory: Path, tenant: str, doc_id: str) -> Path:
        return directory / self._hash(tenant)[:32] / f"{self._hash(doc_id)}.json"

    def _hash(self, value: str) -> str:
        return self._seal.hashed("document", value)
