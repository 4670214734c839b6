"""The store: chunks by key, over tiers, with the documents that hold them."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import torch
from torch import Tensor

from .chunk import Chunk, encode_chunk
from .codecs import get_codec
from .diskindex import DiskIndex
from .documents import Documents
from .errors import BudgetError, IndexDamagedError, StoreClosedError, StoreError, StoreVersionError
from .files import TempFiles, explain, locked, make_directory, write_small
from .index import Index, MemoryIndex
from .keys import FORMAT_VERSION, ChunkKey, Namespace
from .maintenance import COMPLETE, check_files
from .rawfile import DirectIO
from .readers import ChunkReader
from .stats import DocumentInfo, StoreStats, VerifyReport
from .tiers import DiskTier, HostTier, Pins
from .tiers.disk import text_record
from .units import parse_bytes

__all__ = ["ChunkStore"]

_Result = TypeVar("_Result")


class ChunkStore:
    """Keys and values of chunks, in host memory and on disk.

    A chunk is written to disk (durably) and kept in host memory while there is room; reading all of one from disk puts
    it into host memory. Both tiers evict their least recently used chunks to stay within their budgets. Threads may
    share a store, and processes may share its directory.

    Args:
        path: the store's directory, made if missing; None keeps everything in host memory only.
        codec: how new chunks are encoded; chunks of any registered codec are read.
        host_budget: bytes of host memory for chunks, an int or such as "4GiB"; 0 for none. What open readers of the
            disk tier and running put() calls hold comes on top.
        disk_budget: bytes of all chunk files together.
        pin_memory: page-lock host memory, for faster copies to a GPU; None: if there is CUDA.
        direct_io: read past the page cache; None: where the file system supports it.

    Raises:
        ValueError: unknown codec, or a budget that is no byte count.
        StorePathError: the directory can't be used.
        StoreVersionError: it holds a store of another format version.
    """

    def __init__(
        self,
        path: str | Path | None,
        *,
        codec: str = "exact",
        host_budget: int | str = "4GiB",
        disk_budget: int | str = "64GiB",
        pin_memory: bool | None = None,
        direct_io: bool | None = None,
    ) -> None:
        self.path = None if path is None else Path(path)
        self.codec = get_codec(codec).name
        self._pinned = torch.cuda.is_available() if pin_memory is None else pin_memory
        self._pins = Pins()
        self._lock = threading.Lock()
        self._hits = self._misses = self._damaged = 0
        self._closed = False
        self._host = HostTier(parse_bytes(host_budget, "host_budget"), self._pins)
        self._disk: DiskTier | None = None
        self._temp: TempFiles | None = None
        self._index: Index = MemoryIndex()
        disk_bytes = parse_bytes(disk_budget, "disk_budget")
        if self.path is None:
            self._documents = Documents(self._index, None, None)
            return
        try:
            self._open_directory(self.path, disk_bytes, DirectIO(direct_io))
        except OSError as error:
            raise explain(error, self.path) from error

    def put(
        self,
        key: ChunkKey,
        layers: Sequence[tuple[Tensor, Tensor]],
        scores: Tensor,
        *,
        namespace: Namespace,
        token_ids: Sequence[int],
        text: str | None = None,
    ) -> int:
        """Store a chunk; when this returns, it survives a crash (unless the store has no directory).

        A chunk that is there already is left as it is, unless `text` is new to it.

        Args:
            key: make_key(namespace, token_ids).
            layers: a layer's keys before positional encoding [tokens, heads, head_dim] and its values
                [tokens, heads, v_head_dim], on any device, in the namespace's dtype.
            scores: importance [tokens]; rows are stored from the lowest to the highest.
            namespace: what the key was made with.
            token_ids: the chunk's tokens.
            text: what they spell, for texts().

        Returns:
            Bytes the chunk takes in the store: its file, or its rows where there is no directory.

        Raises:
            ValueError: shapes, dtypes, key, or a value that the codec can't store (NonFiniteError).
            BudgetError: the chunk doesn't fit the budget of the disk tier (or of the host tier, if that is all).
            StoreFullError, StorePathError: it can't be written; what was stored before stays.
        """
        self._check_open()
        known = self._known(key, text)
        if known:
            return known
        chunk = encode_chunk(
            key,
            layers,
            scores,
            namespace=namespace,
            token_ids=token_ids,
            text=text or None,
            codec=self.codec,
            pinned=self._pinned and self._host.budget > 0,
        )
        disk = self._disk
        if disk is not None:
            self._healed(lambda: disk.admit(chunk))
            self._admit_host(chunk)
            return disk.size_of(key) or chunk.slab.numel()
        for victim in self._host.admit(chunk):
            self._index.delete(f"text/{victim.key}")
        if chunk.head.text is not None:
            self._index.set(f"text/{key}", text_record(chunk.head))
        return chunk.host_bytes

    def open(self, key: ChunkKey) -> ChunkReader | None:
        """A reader of the chunk, which holds it until closed; None if it isn't stored.

        A file that fails a check is set aside and counted, and is a miss as well.
        """
        self._check_open()
        reader: ChunkReader | None = self._host.open(key)
        if self._disk is not None:
            if reader is None:
                reader = self._disk.open(key)
            else:
                self._disk.touch(key)
        with self._lock:
            self._hits += reader is not None
            self._misses += reader is None
        if reader is not None:
            reader.on_close = self._release
            if reader.tier != "host":
                reader.on_promote = self._promote
        return reader

    def contains(self, key: ChunkKey) -> bool:
        """Whether the chunk is stored; nothing is read or checked."""
        self._check_open()
        return self._host.contains(key) or (self._disk is not None and self._disk.contains(key))

    def discard(self, key: ChunkKey) -> None:
        """Set aside a chunk whose read failed (DamagedChunkError), and count it. The next open() is a miss."""
        self._check_open()
        removed = self._host.remove(key) > 0
        if self._disk is not None:
            self._disk.set_aside(key)
        elif removed:
            with self._lock:
                self._damaged += 1

    def set_document(self, doc_id: str, keys: Sequence[ChunkKey], *, tenant: str = "") -> None:
        """Say which chunks a document holds, in order; replaces what it held.

        Chunks it no longer holds, nor any other document, are deleted. Ids are any strings, apart for each tenant.
        """
        self._check_open()

        def replace() -> None:
            with self._index.transaction():
                self._free(self._documents.put(tenant, doc_id, keys))

        self._healed(replace)

    def delete_document(self, doc_id: str, *, tenant: str = "") -> int:
        """Forget a document and delete the chunks that no other document holds; bytes freed.

        Raises:
            UnknownDocumentError: there is no such document.
        """
        self._check_open()

        def delete() -> int:
            with self._index.transaction():
                return self._free(self._documents.delete(tenant, doc_id))

        return self._healed(delete)

    def documents(self, *, tenant: str = "") -> list[DocumentInfo]:
        """The tenant's documents, by id."""
        self._check_open()
        found = []
        for doc_id, keys in self._healed(lambda: list(self._documents.of(tenant))):
            sizes = [size for size in map(self._size_of, dict.fromkeys(keys)) if size]
            found.append(DocumentInfo(doc_id, tenant, keys, len(sizes), sum(sizes)))
        return sorted(found, key=lambda info: info.id)

    def texts(self, *, namespace: Namespace | None = None) -> Iterator[tuple[ChunkKey, str, int]]:
        """Key, text and token count of every chunk stored with its text; only those of `namespace`, if given."""
        self._check_open()
        wanted = None if namespace is None else namespace.digest
        last = "text/"
        while True:
            try:
                for name, record in self._index.items("text/"):
                    if name > last and (wanted is None or record["namespace"] == wanted):
                        yield ChunkKey(name.removeprefix("text/")), record["text"], record["tokens"]
                    last = max(last, name)
                return
            except IndexDamagedError:
                # Go on behind what was given out already.
                self._check_files(full=False, anew=True)

    def verify(self) -> VerifyReport:
        """Read and check every file in full; set damaged ones aside, delete orphans, repair the index."""
        return self._healed(lambda: self._check_files(full=True))

    def rebuild_index(self) -> VerifyReport:
        """Make the index anew from the files. Happens by itself on open when the index is lost."""
        return self._check_files(full=False, anew=True)

    def stats(self) -> StoreStats:
        """What the store holds, and what it did in this process."""
        self._check_open()
        disk = None if self._disk is None else self._healed(self._disk.stats)
        documents = self._healed(self._documents.count)
        with self._lock:
            return StoreStats(
                hits=self._hits,
                misses=self._misses,
                damaged=self._damaged + (disk.damaged if disk else 0),
                documents=documents,
                host=self._host.stats(),
                disk=disk,
            )

    def close(self) -> None:
        """Release memory and files. Open readers keep working; the store can't be used any more."""
        if self._closed:
            return
        self._closed = True
        if self._disk is not None:
            self._disk.close()
        self._host.close()
        self._index.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open_directory(self, path: Path, disk_budget: int, direct: DirectIO) -> None:
        make_directory(path)
        for name in ("chunks", "documents", "tmp"):
            make_directory(path / name)
        self._temp = temp = TempFiles(path / "tmp")
        with locked(path / "lock"):
            _check_version(path / "store.json", temp)
            self._index = DiskIndex(path / "index")
            self._documents = Documents(self._index, path / "documents", temp)
            self._disk = DiskTier(
                path,
                budget=disk_budget,
                index=self._index,
                temp=temp,
                pins=self._pins,
                pinned=self._pinned,
                direct=direct,
            )
            try:
                complete = self._index.get(COMPLETE) is not None
            except IndexDamagedError:
                self._index.clear()
                complete = False
            if complete:
                temp.clean()
            else:
                check_files(self._disk, self._documents, temp, full=False)

    def _check_files(self, *, full: bool, anew: bool = False) -> VerifyReport:
        self._check_open()
        if self._disk is None or self._temp is None or self.path is None:
            # Nothing on disk to differ from: rows in memory were verified when they were read.
            stats = self._host.stats()
            return VerifyReport(stats.chunks, stats.bytes, (), 0, 0, 0, self._documents.count())
        try:
            with locked(self.path / "lock"):
                if anew:
                    self._index.clear()
                return check_files(self._disk, self._documents, self._temp, full=full)
        except OSError as error:
            raise explain(error, self.path) from error

    def _healed(self, action: Callable[[], _Result]) -> _Result:
        """The action's result; if the index turns out to be damaged, it is rebuilt and the action done again."""
        try:
            return action()
        except IndexDamagedError:
            self._check_files(full=False, anew=True)
            return action()
        except OSError as error:
            raise explain(error, self.path or "memory") from error

    def _known(self, key: ChunkKey, text: str | None) -> int:
        """Bytes of a chunk that needn't be stored again; 0 if it must be."""
        if self._disk is not None:
            head = self._disk.peek(key)
            if head is None or (text and head.text is None):
                return 0
            self._disk.touch(key)
            return self._disk.size_of(key)
        if text and self._index.get(f"text/{key}") is None:
            return 0
        self._host.touch(key)
        return self._host.size_of(key)

    def _admit_host(self, chunk: Chunk) -> bool:
        """Keep a chunk in host memory too, if there is room; what must leave and isn't on disk goes down there."""
        if not self._host.fits(chunk.host_bytes):
            return False
        try:
            evicted = self._host.admit(chunk)
        except BudgetError:
            return False  # everything there is in use
        for victim in evicted:
            if self._disk is not None and not self._disk.contains(victim.key):
                # A chunk that can't be kept is one to compute again, not an error of whoever came next.
                with contextlib.suppress(StoreError):
                    self._disk.admit(victim)
                    self._disk.counters.demotions += 1
        return True

    def _promote(self, chunk: Chunk) -> bool:
        if self._closed or self._disk is None:
            return False
        if self._host.contains(chunk.key):
            return True
        if not self._admit_host(chunk):
            return False
        if not self._disk.contains(chunk.key):
            # Deleted while it was being read: a deleted chunk must not come back.
            self._host.remove(chunk.key)
            return False
        self._host.counters.promotions += 1
        return True

    def _release(self, reader: ChunkReader) -> None:
        self._pins.drop(reader.key)
        tier = self._host if reader.tier == "host" or self._disk is None else self._disk
        with self._lock:
            tier.counters.bytes_read += reader.bytes_read
        if self._disk is not None and not self._closed:
            with contextlib.suppress(StoreError):
                self._disk.flush(force=False)

    def _free(self, keys: Sequence[ChunkKey]) -> int:
        """Delete chunks from all tiers; bytes freed on disk, or in memory if there is no disk."""
        freed = 0
        for key in keys:
            in_memory = self._host.remove(key)
            if self._disk is None:
                self._index.delete(f"text/{key}")
                freed += in_memory
            else:
                freed += self._disk.remove(key)
        return freed

    def _size_of(self, key: ChunkKey) -> int:
        on_disk = 0 if self._disk is None else self._disk.size_of(key)
        return on_disk or self._host.size_of(key)

    def _check_open(self) -> None:
        if self._closed:
            raise StoreClosedError("the store is closed; open it again")


def _check_version(path: Path, temp: TempFiles) -> None:
    """Read the store's format version, or write it into a new store."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        write_small(temp, path, json.dumps({"format": "cachetune-store", "version": FORMAT_VERSION}).encode())
        return
    try:
        version = json.loads(content)["version"]
    except (ValueError, TypeError, KeyError) as error:
        raise StoreVersionError(
            f"{path} is damaged; if the directory is a store of version {FORMAT_VERSION}, delete that file and open "
            "the store again"
        ) from error
    if version != FORMAT_VERSION:
        raise StoreVersionError(
            f"{path.parent} holds a store of format version {version!r}; this release reads version {FORMAT_VERSION}. "
            "Use a release that reads it, or give the store another directory and precompute again"
        )
