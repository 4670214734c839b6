"""The store: chunks by key, over tiers, with the documents that hold them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from .arguments import check_flag, check_items, check_key, check_keys, check_kind, check_text
from .chunk import Chunk, ChunkHead, encode_chunk
from .claims import Claim
from .errors import (
    StoreArgumentError,
    StoreClosedError,
    StoreError,
    StoreForkedError,
    StoreReadOnlyError,
)
from .holders import Holders
from .keys import ChunkKey, Namespace
from .parts import StoreParts
from .printing import shown
from .pruning import Keep
from .readers import ChunkReader
from .seals import Seal
from .settings import StoreSettings
from .stats import ChunkGroup, DocumentInfo, PruneReport, StoreStats, TenantStats, VerifyReport
from .storekey import GivenKey, StoreKey
from .tier_kinds import NAMES
from .tiers import DeviceTier, Tier, TierKind
from .units import MOST_BYTES

__all__ = ["ChunkStore"]


class ChunkStore:
    """Keys and values of chunks, in host memory, on disk and in a place that many machines share.

    A chunk is written to disk, durably, and kept in host memory while there is room. A chunk of which all rows are read from disk is put
    into host memory. Chunks in use can also be kept in a GPU's memory. Every tier evicts its least recently used chunks to stay
    within its budget. Threads may share a store, and processes may share its directory.

    Args:
        path: the store's directory, made if missing; ~ and $VARIABLES are filled in, and a relative path is taken from the
            current directory, once. One of which any part can't be written is only read: nothing is stored then (`read_only`). None keeps
            everything in host memory only. A URL, as for `remote`: everything is kept there and in host memory, without a directory.
        codec: how new chunks are encoded; chunks of any registered codec are read.
        host_budget: bytes of host memory for chunks, as an int or such as "4GiB"; 0 for none. Open readers of the disk tier,
            running calls of put(), and `read_memory` take memory besides.
        disk_budget: bytes of all chunk files together.
        device_budget: bytes of a device's memory for encoded chunks in use; 0: none are kept there. A chunk is copied
            there when it is promoted from host memory (`ChunkReader.promote`), or from disk if host memory has no room
            for it.
        device: the device of that tier; None: the current CUDA device.
        read_memory: bytes of unused host memory that are kept for later reads from disk, because touching and page-locking new
            memory takes longer than filling it from a disk. None: an eighth of host_budget, or 256 MiB if that is more.
        pin_memory: whether to page-lock host memory, for faster copies to a GPU; None: if there is CUDA.
        direct_io: whether to read around the page cache; None: if the file system supports it.
        remote: URL of a place that many machines share, behind the directory: a bucket ("s3://bucket/prefix", "gs://...", "az://..."), a
            folder ("file:///folder") or a Valkey or Redis server ("valkey://host:6379"). What is stored here is written there soon, and
            what others store and remove there is seen within seconds. See docs/scale.md.
        remote_codec: how chunks are encoded there; None: as they are here.
        remote_timeout: seconds that a read from there may take, further tries included. Then the chunk counts as unreadable.
        remote_options: further arguments for what reaches it: of obstore's `from_url` for buckets, of `GlideClientConfiguration` for servers.
        store_key: the store's key: itself (32 random bytes at least), the path of the file that holds it, or "env:NAME" for an environment
            variable. With it, whatever was not written with the same key is damage, in the directory and in the shared place. A store
            that was made with a key opens with it only, and one that was made without opens without. None: there is none.
        encrypt: whether a new store is encrypted, in the directory and in the shared place, which takes a key. A store that is there says itself
            whether it is, and a new directory before a shared place is as that is; True refuses one that isn't. None: a new one isn't. See SECURITY.md.

    Attributes:
        path: the directory, absolute; None if there is none.
        remote: the URL of the shared place, without its password; None if there is none.
        codec: name of the codec that new chunks are encoded with.
        index: the records by which the store finds its chunks and documents. Users have no need of it.
        memory: the pool that host memory for rows comes from. Users have no need of it either.

    Raises:
        StoreArgumentError: unknown codec, a budget that is not a number of bytes, or pin_memory=True or a device_budget without CUDA.
        StorePathError: the directory can't be used.
        StoreVersionError: it holds a store of another format version.
        StoreKeyError: it was made with a key and that isn't given, or another one is; or one is given, and it was made without; or it is to be
            encrypted, and was made without encryption.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        *,
        codec: str = "exact",
        host_budget: int | str = "4GiB",
        disk_budget: int | str = "64GiB",
        device_budget: int | str = 0,
        device: str | torch.device | None = None,
        read_memory: int | str | None = None,
        pin_memory: bool | None = None,
        direct_io: bool | None = None,
        remote: str | None = None,
        remote_codec: str | None = None,
        remote_timeout: float = 5.0,
        remote_options: Mapping[str, Any] | None = None,
        store_key: GivenKey = None,
        encrypt: bool | None = None,
    ) -> None:
        self._settings = settings = StoreSettings(
            path,
            codec=codec,
            host_budget=host_budget,
            disk_budget=disk_budget,
            device_budget=device_budget,
            device=device,
            read_memory=read_memory,
            pin_memory=pin_memory,
            direct_io=direct_io,
            remote=remote,
            remote_codec=remote_codec,
            remote_timeout=remote_timeout,
            remote_options=remote_options,
            store_key=store_key,
            encrypt=encrypt,
        )
        self.path, self.remote, self.codec = settings.path, settings.remote, settings.codec
        self._closed = False
        self._process = os.getpid()
        self._parts = parts = StoreParts(settings)
        self.index, self.memory = parts.index, parts.memory
        self._placement, self._repair = parts.placement, parts.repair
        self._documents, self._notes, self._claims = parts.documents, parts.notes, parts.claims
        self._shared, self._secrets = parts.shared, parts.secrets
        self._changes, self._texts, self._overview = parts.changes, parts.texts, parts.overview
        self._upkeep, self._deletion = parts.upkeep, parts.deletion

    def check_writable(self) -> None:
        """Raise an error if nothing can be written, before work is done for it.

        Raises:
            StoreReadOnlyError: the directory may only be read.
        """
        self._check_open()
        directory = self._parts.directory
        refusal = None if directory is None else directory.read_only
        if refusal is not None:
            raise StoreReadOnlyError(
                f"the store {self.path} can only be read here ({refusal.filename or self.path}: {refusal.strerror}): it answers from what it "
                "has, and nothing is stored, removed or repaired. Open it where this user may write, or use another folder"
            )

    def put(
        self,
        key: ChunkKey,
        layers: Sequence[tuple[Tensor, Tensor]],
        scores: Tensor,
        *,
        namespace: Namespace,
        token_ids: Sequence[int],
        text: str | None = None,
        deviations: Tensor | None = None,
    ) -> int:
        """Store a chunk. When this returns, the chunk survives a crash, unless the store has no directory.

        A chunk that is stored already is not changed, unless it has no text and `text` is given.

        Args:
            key: make_key(namespace, token_ids).
            layers: a layer's keys before positional encoding [tokens, heads, head_dim] and its values
                [tokens, heads, v_head_dim], on any device, in the namespace's dtype.
            scores: importance [tokens]. Rows are stored from the lowest score to the highest.
            namespace: the namespace that the key was made with.
            token_ids: the chunk's tokens.
            text: the chunk's text, for texts().
            deviations: how far keys and values were apart behind different lead-ins, [tokens, columns] as in ChunkHead. They are
                stored as float16. None if there was one lead-in.

        Returns:
            Bytes that the chunk takes in the store: those of its file, or of its rows if the store has no directory.

        Raises:
            StoreArgumentError: shapes, dtypes or key are wrong, or the codec can't store a value (NonFiniteError).
            BudgetError: the chunk doesn't fit into the budget of the disk tier (or of the host tier, if there is no directory).
            StoreFullError, StorePathError: it can't be written. What was stored before stays.
        """
        self._check_open()
        check_key(key)
        if text is not None:
            check_text(text, "text")
        known = self._repair.healed(lambda: self._placement.known(key, text))
        if known:
            return known
        self.check_writable()
        chunk = self.encode(
            key, layers, scores, namespace=namespace, token_ids=token_ids, text=text, deviations=deviations
        )
        return self._stored(chunk)

    def encode(
        self,
        key: ChunkKey,
        layers: Sequence[tuple[Tensor, Tensor]],
        scores: Tensor,
        *,
        namespace: Namespace,
        token_ids: Sequence[int],
        text: str | None = None,
        deviations: Tensor | None = None,
    ) -> Chunk:
        """The first half of put(): compute the chunk as its file will hold it. Nothing is stored.

        It is separate from write(), so that a job can encode on the thread that computes, and write on another one.
        """
        self._check_open()
        if text is not None:
            check_text(text, "text")
        return encode_chunk(
            key,
            layers,
            scores,
            namespace=namespace,
            token_ids=token_ids,
            text=text or None,
            codec=self.codec,
            pool=self.memory,
            deviations=deviations,
            seal=self.seal.in_memory,
        )

    def write(self, chunk: Chunk) -> int:
        """The second half of put(): store an encoded chunk, durably. It returns and raises the same as put()."""
        self._check_open()
        check_kind(chunk, Chunk, "chunk", "use what encode() gave")
        known = self._repair.healed(lambda: self._placement.known(chunk.key, chunk.head.text))
        if known:
            return known
        self.check_writable()
        return self._stored(chunk)

    def _stored(self, chunk: Chunk) -> int:
        size = self._repair.healed(lambda: self._placement.put(chunk))
        if self._shared is not None:
            self._shared.changed()
        return size

    def open(self, key: ChunkKey, *, errors: list[StoreError] | None = None) -> ChunkReader | None:
        """A reader of the chunk, which keeps the chunk readable until it is closed; None if the chunk isn't stored.

        A file that fails a check is set aside and counted as damaged, and None is returned. None is also returned if the file can't be
        read. In both cases a DamagedChunkError or StorePathError is added to `errors`.
        """
        self._check_open()
        check_key(key)
        if errors is not None:
            check_kind(errors, list, "errors", "use a list to be filled, or None")
        self._secrets.look()
        return self._placement.open(key, [] if errors is None else errors)

    def open_in_memory(self, key: ChunkKey) -> ChunkReader | None:
        """As open(), but only if the chunk is in host memory or on the device. The disk is not touched."""
        self._check_open()
        check_key(key)
        self._secrets.look()
        return self._placement.open_in_memory(key)

    def foresee(self, key: ChunkKey) -> tuple[TierKind, ChunkHead] | None:
        """From what kind of tier a chunk would be read, and its head; None where that can't be told without waiting for a disk or another machine.

        A chunk on disk is known if it was opened before (of an encrypted store, none is). Its file may be gone since. Nothing is counted.
        """
        self._check_open()
        check_key(key)
        return self._placement.foresee(key)

    def contains(self, key: ChunkKey, *, lasting: bool = False) -> bool:
        """Whether the chunk is stored. Nothing of it is read or checked.

        With `lasting`, a chunk of a store on disk only counts if its file exists. Memory may still have a chunk that another process has
        deleted or evicted.
        """
        self._check_open()
        check_key(key)
        check_flag(lasting, "lasting")
        self._secrets.look()
        return self._placement.contains(key, lasting=lasting)

    @property
    def seal(self) -> Seal:
        """What makes and checks the sums of files in the directory. With a key, it is for whoever keeps files of their own there."""
        return self._parts.seal

    @property
    def read_only(self) -> bool:
        """Whether the directory may be read but not written. Nothing is then stored."""
        directory = self._parts.directory
        return directory is not None and directory.read_only is not None

    @property
    def host_budget(self) -> int:
        """Bytes that the host tier may hold."""
        return self._parts.host.budget

    @property
    def device_budget(self) -> int:
        """Bytes of a device's memory for chunks."""
        device = self._placement.find(DeviceTier)
        return 0 if device is None else device.budget

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return self._closed

    @property
    def tiers(self) -> tuple[TierKind, ...]:
        """The kinds of tiers that can hold a chunk in this store, the fastest first. Host memory without a budget is not among them."""
        # The disk counts whatever its budget: the chunks of a full or a read-only store are there.
        return tuple(tier.kind for tier in self._placement.tiers if tier.budget or tier.kind.lasting)

    def tier(self, name: str) -> Tier:
        """The tier of this name: "device", "host" or "disk". Only for tests and measurements that bring a tier into a certain state.

        Raises:
            StoreArgumentError: the store has no such tier.
        """
        self._check_open()
        return self._placement.tier(name)

    def alone(self, name: str) -> ChunkStore:
        """Open a tier that lasts as a store of its own, which keeps nothing in memory. Only for measurements.

        Raises:
            StoreArgumentError: the store has no such tier, or chunks there don't last.
            StorePathError: it is the remote tier, which can't be used.
        """
        kind = self.tier(name).kind
        if not kind.lasting:
            raise StoreArgumentError(f"tier is {shown(name)}, in which nothing lasts; use a tier that does")
        # Memory that rows were read into is used again, as it is for requests when host memory is full.
        options: dict[str, Any] = {"host_budget": 0, "read_memory": MOST_BYTES}
        if kind.shared_by != "machines":
            return ChunkStore(self.path, disk_budget=MOST_BYTES, store_key=self._secrets.given, **options)
        self.sync()  # what was stored just now is to be there
        return ChunkStore(
            self._settings.remote_url,
            store_key=self._secrets.given,
            remote_timeout=self._settings.remote_timeout,
            remote_options=self._settings.remote_options,
            **options,
        )

    def settle_memory(self) -> None:
        """Make host memory that is no longer used ready for new chunks. See `SlabPool.prepare_idle_memory`."""
        self.memory.prepare_idle_memory()

    def read_speed(self, tier: str) -> float | None:
        """Bytes of rows a second that a tier has given lately to requests that waited for them; None if that isn't known, or its chunks needn't be read.

        Raises:
            StoreArgumentError: no tier is called so.
        """
        self._check_open()
        if not (isinstance(tier, str) and tier in NAMES):
            raise StoreArgumentError(f"tier is {shown(tier)}: use one of {', '.join(map(repr, NAMES))}.")
        speed = self._placement.speeds.get(tier)
        return None if speed is None else speed.lately

    def touch_host(self, key: ChunkKey) -> int:
        """Bytes that a chunk takes in host memory, or on the device if it is only there; 0 if neither has it.

        The chunk counts as used now, but neither a hit nor a miss is counted.
        """
        self._check_open()
        check_key(key)
        return self._placement.touch_memory(key)

    def touch(self, key: ChunkKey) -> None:
        """Count a chunk as used now, wherever it is, without waiting for a disk: chunks that were not used for longest are evicted first. Neither a hit nor a
        miss is counted.
        """
        self._check_open()
        check_key(key)
        self._placement.touch(key)

    def size_of(self, key: ChunkKey) -> int:
        """Bytes that a chunk takes in the slowest tier that has it; 0 if none has. Nothing of it is read."""
        self._check_open()
        check_key(key)
        return self._placement.size_of(key)

    def whole(self, key: ChunkKey) -> Chunk | None:
        """All of a chunk, from host memory or else from disk; None if neither has it. It stays in its tier.

        Don't write to it: it may be the store's own memory.

        Raises:
            DamagedChunkError: the file fails a check.
        """
        self._check_open()
        check_key(key)
        return self._placement.whole(key)

    def discard(self, key: ChunkKey) -> bool:
        """Check a chunk again after reading it raised a DamagedChunkError. If it is damaged, set it aside and count it.

        Returns whether it was damaged. If so, the next open() returns None.
        """
        self._check_open()
        check_key(key)
        return self._placement.discard(key)

    def claim(self, keys: Iterable[ChunkKey]) -> Claim:
        """Claim chunks that are about to be computed. The claim's `keys` are those that nobody else has claimed.

        So jobs that share a store don't compute the same chunks. Close the claim when the chunks are stored. A claim ends with its
        process, and keeps nobody from storing a chunk.
        """
        self._check_open()
        wanted = check_keys(keys)
        return self._repair.healed(lambda: self._claims.claim(wanted))

    def claimants(self, keys: Iterable[ChunkKey]) -> Holders:
        """Which other processes have claimed some of these chunks, and which of those are stopped.

        For log lines: to find it out takes some milliseconds. Threads of this process are not named.
        """
        self._check_open()
        return self._claims.holders(check_keys(keys))

    def set_document(self, doc_id: str, keys: Sequence[ChunkKey], *, tenant: str = "") -> None:
        """Register the chunks of a document, in order, in place of those that it held.

        Chunks that no document holds any more are deleted. An id is any string; each tenant has its own ids.
        """
        self.check_writable()
        check_text(doc_id, "document id")
        check_text(tenant, "tenant")
        self._changes.put(tenant, doc_id, check_keys(keys))

    def extend_document(
        self, document_id: str, keys: Sequence[ChunkKey], *, tenant: str = "", since: int | None = None
    ) -> bool:
        """Add chunks to the end of a document. The document is made if there is none of that id.

        Chunks that it holds already stay where they are, so doing this twice changes nothing. This is for documents whose chunks come
        at different times, in several runs or after requests that missed them.

        Args:
            document_id: the document.
            keys: the chunks.
            tenant: the document's tenant.
            since: a number from `changes_so_far`, taken when these were known to be the document's chunks. If this process has
                removed or replaced the document since, nothing is added. None: they are known to be its chunks now.

        Returns:
            Whether the document holds the chunks now.
        """
        self.check_writable()
        check_text(document_id, "document id")
        check_text(tenant, "tenant")
        return self._changes.extend(tenant, document_id, check_keys(keys), since)

    def removed_since(self, number: int, document_id: str | None = None, *, tenant: str = "") -> bool:
        """Whether this process has removed or replaced a document, or deleted its tenant, since `changes_so_far` was `number`."""
        self._check_process()
        if isinstance(number, bool) or not isinstance(number, int):
            raise StoreArgumentError(f"number is {shown(number)}; use one from changes_so_far()")
        if document_id is not None:
            check_text(document_id, "document id")
        check_text(tenant, "tenant")
        return self._parts.removals.since(number, tenant, document_id)

    @property
    def texts_gone(self) -> int:
        """How often this process has removed texts from documents."""
        return self._parts.removals.texts_gone

    def holders(self, keys: Sequence[ChunkKey], *, tenant: str = "") -> list[str]:
        """Ids of the tenant's documents that hold one of these chunks. Unless there are none, all records of the tenant are read."""
        self._check_open()
        check_text(tenant, "tenant")
        wanted = check_keys(keys)
        return self._repair.healed(lambda: self._documents.holders(tenant, wanted))

    def holds(self, key: ChunkKey) -> bool:
        """Whether any document holds a chunk, whether the chunk is stored or not."""
        self._check_open()
        check_key(key)
        return self._repair.healed(lambda: self._documents.holds(key))

    def free_unheld(self, key: ChunkKey) -> bool:
        """Delete a chunk unless a document holds it. Returns whether it was deleted.

        Call it after a document's chunk was stored: the document may have been removed before the chunk was written.
        """
        self.check_writable()
        check_key(key)
        return self._changes.free_unheld(key)

    def delete_document(self, doc_id: str, *, tenant: str = "") -> int:
        """Delete a document and the chunks that no other document holds. Returns the bytes that were freed.

        Raises:
            UnknownDocumentError: there is no such document.
        """
        self.check_writable()
        check_text(doc_id, "document id")
        check_text(tenant, "tenant")
        return self._changes.delete(tenant, doc_id)

    def documents(self, *, tenant: str = "") -> list[DocumentInfo]:
        """The tenant's documents, by id."""
        self._check_open()
        check_text(tenant, "tenant")
        return self._overview.documents(tenant)

    def sample_documents(self, most: int, *, tenant: str = "") -> list[tuple[ChunkKey, ...]]:
        """The chunks of some of the tenant's documents, at most so many, which lie evenly among all.

        Only the index is read, whereas `documents` looks at the file of every chunk.
        """
        self._check_open()
        check_text(tenant, "tenant")
        if type(most) is not int or most < 1:
            raise StoreArgumentError(f"most is {shown(most)}: use a whole number from 1 on.")
        return self._overview.sample(tenant, most)

    def texts(
        self, *, namespace: Namespace | None = None, keys: Iterable[ChunkKey] | None = None
    ) -> Iterator[tuple[ChunkKey, str, int]]:
        """Key, text and token count of every chunk stored with its text; only those of `namespace`, and of `keys`, if given.

        A chunk that had to make room is among them as long as a document holds it.
        """
        self._check_open()
        if namespace is not None:
            check_kind(namespace, Namespace, "namespace", "use a Namespace, or None for all")
        wanted = None if namespace is None else namespace.digest
        return self._texts.every(wanted) if keys is None else self._texts.of(check_keys(keys), wanted)

    def texts_in_memory(self) -> list[str]:
        """The texts of the chunks that memory has now, the host's or a device's, as far as they are stored with their texts."""
        self._check_open()
        heads = (head for tier in self._placement.tiers if tier.kind.in_memory for _, head in tier.heads())
        return [head.text for head in heads if not isinstance(head, Exception) and head.text is not None]

    def keys_in_memory(self) -> list[ChunkKey]:
        """The chunks that memory has now, the host's or a device's, the one used last first."""
        self._check_open()
        keys = (key for tier in self._placement.tiers if tier.kind.in_memory for key, _ in reversed(list(tier.heads())))
        return list(dict.fromkeys(keys))

    def text_keys(self) -> list[ChunkKey]:
        """The keys of all chunks stored with their texts, of whatever namespace; far quicker than `texts`, for it reads no text."""
        self._check_open()
        return self._texts.keys()

    def note(self, name: str, *, tenant: str = "") -> bytes | None:
        """A note, which is a small record on which all users of the store agree; None if there is none of that name (64 hex digits).

        It is read from disk each time, so it is what any process has written. If it is too long, only its beginning is returned.
        """
        self._check_open()
        check_text(tenant, "tenant")
        return self._repair.healed(lambda: self._notes.get(tenant, name))

    def settle_note(self, name: str, content: bytes, *, tenant: str = "") -> bytes:
        """Write a note unless there is one of that name. Returns the note that is there now.

        Raises:
            StoreArgumentError: the name is not a digest, or the content is longer than 1 MiB.
            StoreFullError, StorePathError: it can't be written.
        """
        self.check_writable()
        check_text(tenant, "tenant")
        return self._repair.healed(lambda: self._notes.write_first(tenant, name, content))

    def discard_note(self, name: str, content: bytes, *, tenant: str = "") -> bool:
        """Set aside a note that turned out to be damaged, if its content is still `content`. Returns whether it was."""
        self.check_writable()
        check_text(tenant, "tenant")
        return self._repair.healed(lambda: self._notes.set_aside(tenant, name, content))

    def revision(self) -> int:
        """A number that changes whenever the result of texts() changes, in any process."""
        self._check_open()
        return self._texts.revision()

    def verify(self) -> VerifyReport:
        """Read and check every file in full. Set damaged ones aside, delete files of dead writers, and repair the index.

        Of the remote tier, only what dead writers left is looked for and deleted.
        """
        self.check_writable()
        return self._upkeep.verify()

    def sync(self) -> None:
        """Tell the remote tier what changed here, and read what others changed there, now. It also happens by itself, within seconds.

        Raises:
            StorePathError: the remote tier can't be used.
        """
        self._check_open()
        if self._shared is not None:
            self._shared.now()

    def groups(self) -> list[ChunkGroup]:
        """Groups of chunks that were made alike, the largest first. The head of every file is read."""
        self._check_open()
        return self._overview.groups()

    def tenants(self, found: Iterable[ChunkGroup] | None = None) -> list[TenantStats]:
        """What each tenant has in the store, the largest first. This is for the operator of the store, not for its tenants.

        Args:
            found: what groups() returned just now; None: groups() is called, which reads the head of every file.
        """
        self._check_open()
        if found is not None:
            found = check_items(found, "groups", "use what groups() gave, or None")
            for group in found:
                check_kind(group, ChunkGroup, "group", "use what groups() gave")
        return self._overview.tenants(found)

    def prune(self, keep: Keep, *, foreign_too: bool = False, dry_run: bool = False) -> PruneReport:
        """Remove every chunk for which `keep` returns False.

        Documents stay. Precompute them again to store the removed chunks anew. Damaged files are not removed; see verify().

        Args:
            keep: called with the head of each chunk.
            foreign_too: whether to remove files of other format versions as well.
            dry_run: whether to only count what would be removed.

        Raises:
            StorePathError: the remote tier can't be read now. No chunk is removed then; do it again when it answers.
        """
        self._check_open()
        if not callable(keep):
            raise StoreArgumentError(f"keep is {shown(keep)}, which can't be called; use a function of a chunk's head")
        check_flag(foreign_too, "foreign_too")
        check_flag(dry_run, "dry_run")
        if not dry_run:
            self.check_writable()
        return self._upkeep.prune(keep, foreign_too=foreign_too, dry_run=dry_run)

    def delete_tenant(self, tenant: str) -> int:
        """Delete a tenant's documents, notes and all its chunks. Returns the bytes that were freed.

        In an encrypted store, the tenant's secrets are erased first. What was written with them can't be read any more then, wherever it is:
        by this process at once, by others that share the directory with the next chunk that they open, by other machines within seconds.

        Raises:
            StorePathError: the remote tier can't be used now, so something of the tenant may be left; do it again when it answers.
        """
        self.check_writable()
        check_text(tenant, "tenant")
        return self._deletion.delete(tenant)

    def renew_secret(self, *, tenant: str = "") -> None:
        """Draw a new secret for a tenant of an encrypted store. What is written from now on is encrypted with it.

        What is there stays readable, with the secret that it was written with; precompute anew what must not. Other processes that have the
        store open use the new secret once they open it again.

        Raises:
            StoreArgumentError: the store isn't encrypted.
            StorePathError: it can't be written now.
        """
        self.check_writable()
        check_text(tenant, "tenant")
        secrets = self._secrets.of_tenants
        if secrets is None:
            raise StoreArgumentError(
                f"the store {self.path or self.remote or 'in memory'} is not encrypted, so its tenants have no secrets; make an encrypted one in "
                "another place (encrypt=True)"
            )
        self._repair.healed(lambda: secrets.renew(tenant))

    def change_key(self, new_key: GivenKey) -> None:
        """Give a store that has a key another one, in its directory and in the shared place. No file is written again.

        What is open stays usable. Whoever opens the store from now on needs the new key. Someone who had the old key and could read the
        store may have what it protects (the root key), so if a key has become known, make a new store.

        Raises:
            StoreKeyError: the store has no key.
            StorePathError: the shared place can't be used, or the directory not written. Do it again: a part that has the new key is passed over.
                From another process, open the directory with the old key and without `remote` for that.
        """
        self.check_writable()
        new = StoreKey.given(new_key)
        if new is None:
            raise StoreArgumentError("new_key is None; a store that was made with a key keeps having one")
        self._secrets.change_key(new_key, new)

    def rebuild_index(self) -> VerifyReport:
        """Make the index anew from the files. If the index is lost, this is done when the store is opened."""
        self.check_writable()
        return self._upkeep.rebuild_index()

    def stats(self) -> StoreStats:
        """What the store holds, and what it did in this process, for all tenants together."""
        self._check_open()
        return self._overview.stats()

    def close(self) -> None:
        """Release memory and files. Open readers keep working, but the store can't be used any more.

        In a process that was forked off since the store was opened, nothing is released, because it belongs to the parent.
        """
        if self._closed:
            return
        self._closed = True
        if os.getpid() != self._process:
            return
        self._parts.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise StoreClosedError("the store is closed; open it again")
        self._check_process()

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise StoreForkedError(
                f"the store {self.path or 'in memory'} was opened by process {self._process}, from which this one was "
                "forked: its files and locks are that process's. Open a store in each process after the fork (with "
                "gunicorn in post_fork or without preload), or start processes by 'spawn'"
            )
