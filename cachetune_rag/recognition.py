"""Finding stored chunk texts inside a plain prompt string.

Frameworks often hand over one finished string in which the retrieved passages no longer stand apart. `ChunkRecognizer`
knows the texts of the stored chunks and cuts such a string back into what is reusable (`Chunk`) and what is not (`Text`).

How it stays fast: one vectorised pass gives the polynomial prefix hash of the prompt, from which the hash of any slice
costs a subtraction and two multiplications. A bitmap over the hashes of every chunk's first `ANCHOR` characters then
leaves the few places where a chunk may begin. Only there, longer prefixes (twice, four times the anchor, ...) narrow
the chunks down to those of a few lengths, so many chunks that share a header cost no more than one that doesn't.

How it stays right: a place counts only when the SHA-256 of the whole slice is that of a stored text. The same digest
is what the store trusts for its keys, and it lets this index keep digests instead of texts.
"""

import logging
import threading
import time
from collections.abc import Hashable, Iterable, Mapping, Sequence
from hashlib import sha256
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from cachetune_rag.deadline import Call, call_directly
from cachetune_rag.leads import LeadIns
from cachetune_rag.prompt import Chunk, Segment, Text
from cachetune_rag.rolling_hash import Hashes, PrefixHashes
from cachetune_store import ChunkKey, ChunkStore, StoreError

ANCHOR = 32
"""Characters by which the beginning of a chunk is found; shorter chunks are never recognised (they save nothing)."""

_MASK = (1 << 64) - 1
_MIX = 0xBF58476D1CE4E5B9
_BITMAP_BITS = 22
_STALE = 1 << 18
_PATIENCE = 0.05  # seconds that a prompt waits for the store to be read again

_K = TypeVar("_K")
_log = logging.getLogger(__name__)


class _Entry(NamedTuple):
    anchor: int
    group: int
    length: int
    full: int
    digest: bytes


class ChunkRecognizer:
    """Recognises known chunk texts in a string: leftmost first, the longest at a place, verified in full.

    Chunks are known by a key of the caller's (the chunk key), so a text may be added under several keys and stays known
    until the last is removed. Memory: about a kilobyte a chunk, whatever its length. Safe to use from many threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: dict[Hashable, _Entry] = {}
        self._anchors: dict[int, int] = {}  # hash of the first ANCHOR characters -> chunks that begin so
        self._groups: dict[int, dict[int, int]] = {}  # hash of (level, longest prefix of a level) -> length -> chunks
        self._texts: dict[int, dict[bytes, int]] = {}  # hash of (length, whole text) -> digest -> chunks
        self._levels: dict[int, int] = {}  # level -> chunks
        self._bitmap = np.zeros(1 << (_BITMAP_BITS - 3), dtype=np.uint8)
        self._stale = 0  # bits of the bitmap that no chunk needs any more

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._entries

    def add(self, key: Hashable, text: str) -> bool:
        """Make `text` known under `key`, in place of what that key stood for; False when it is too short to recognise."""
        if len(text) < ANCHOR:
            self.remove(key)
            return False
        return self.update([(key, text)]) == 1

    def update(self, items: Iterable[tuple[Hashable, str]]) -> int:
        """Add many `(key, text)`; returns how many are long enough to be recognised."""
        known = 0
        for key, text in items:
            entry = _describe(text) if len(text) >= ANCHOR else None
            with self._lock:
                self._forget(key)
                if entry is not None:
                    self._learn(key, entry)
                    known += 1
        return known

    def remove(self, key: Hashable) -> bool:
        """Forget the chunk of `key`; False when it was not known."""
        with self._lock:
            return self._forget(key)

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            for table in (self._entries, self._anchors, self._groups, self._texts, self._levels):
                table.clear()
            self._bitmap[:] = 0

    def segment(self, prompt: str) -> list[Segment]:
        """Cut `prompt` into `Text` and `Chunk` segments whose texts joined are exactly `prompt`; none is empty."""
        segments: list[Segment] = []
        done = 0
        for start, end in self.find(prompt):
            if start > done:
                segments.append(Text(prompt[done:start]))
            segments.append(Chunk(prompt[start:end]))
            done = end
        if done < len(prompt):
            segments.append(Text(prompt[done:]))
        return segments

    def find(self, prompt: str) -> list[tuple[int, int]]:
        """Where known chunks stand in `prompt`: `[start, end)` in characters, in order and without overlap."""
        if len(prompt) < ANCHOR or not self._entries:
            return []
        prefix = PrefixHashes(prompt)
        with self._lock:
            starts = self._candidates(prefix)
            probes = [
                (level, prefix.slices_at(starts, ANCHOR << level).tolist())
                for level in sorted(self._levels, reverse=True)
            ]
            found: list[tuple[int, int]] = []
            done = 0
            for row, start in enumerate(starts.tolist()):
                if start < done:
                    continue
                done = (
                    self._longest_at(prompt, prefix, start, [(level, hashes[row]) for level, hashes in probes]) or done
                )
                if done > start:
                    found.append((start, done))
        return found

    def _candidates(self, prefix: PrefixHashes) -> npt.NDArray[np.intp]:
        """Places where the bitmap and then the table of anchors say that a chunk may begin."""
        hashes = prefix.slices(ANCHOR)
        slots = _slots(hashes)
        maybe = np.flatnonzero((self._bitmap[slots >> np.uint32(3)] >> (slots & np.uint32(7)).astype(np.uint8)) & 1)
        sure = [anchor in self._anchors for anchor in hashes[maybe].tolist()]
        return maybe[np.array(sure, dtype=bool)] if sure else maybe

    def _longest_at(self, prompt: str, prefix: PrefixHashes, start: int, probes: list[tuple[int, int]]) -> int | None:
        """The end of the longest chunk at `start`; `probes` are (level, hash of that level's prefix), longest first."""
        for level, head in probes:
            if start + (ANCHOR << level) > len(prompt):
                continue
            lengths = self._groups.get(_tag(head, level))
            if lengths is None:
                continue
            fitting = sorted((length for length in lengths if start + length <= len(prompt)), reverse=True)
            for length, full in zip(fitting, prefix.slices_from(start, fitting), strict=True):
                digests = self._texts.get(_tag(full, length))
                if digests is not None and _digest(prompt[start : start + length]) in digests:
                    return start + length
        return None

    def _learn(self, key: Hashable, entry: _Entry) -> None:
        self._entries[key] = entry
        _count(self._anchors, entry.anchor)
        _count(self._groups.setdefault(entry.group, {}), entry.length)
        _count(self._texts.setdefault(entry.full, {}), entry.digest)
        _count(self._levels, _level(entry.length))
        self._mark([entry.anchor])

    def _mark(self, anchors: list[int]) -> None:
        slots = _slots(np.array(anchors, dtype=np.uint64))
        bits = np.uint8(1) << (slots & np.uint32(7)).astype(np.uint8)
        np.bitwise_or.at(self._bitmap, slots >> np.uint32(3), bits)

    def _forget(self, key: Hashable) -> bool:
        entry = self._entries.pop(key, None)
        if entry is None:
            return False
        _discount(self._anchors, entry.anchor)
        if entry.anchor not in self._anchors:
            # Other chunks may share the bit, so it stays; a stale one only costs a look into the table.
            self._stale += 1
            if self._stale > _STALE:
                self._bitmap[:] = 0
                self._mark(list(self._anchors))
                self._stale = 0
        _discount(self._levels, _level(entry.length))
        if not _discount(self._groups[entry.group], entry.length):
            del self._groups[entry.group]
        if not _discount(self._texts[entry.full], entry.digest):
            del self._texts[entry.full]
        return True


class StoreRecognizer:
    """Recognises the chunks of one engine in prompts, and follows what any process does to their store.

    The store is read at the first use, and again when it has changed since. What this process adds is told by `add`.
    Following others is bounded to a twentieth of the time, and done in the background where it takes long: until then
    their new chunks are computed as plain text, which is as right.
    """

    def __init__(self, store: ChunkStore, lead_ins: LeadIns, call: Call = call_directly):
        self._store, self._lead_ins, self._call = store, lead_ins, call
        self._known = ChunkRecognizer()
        self._lock, self._turn = threading.Lock(), threading.Lock()
        self._keys: set[ChunkKey] = set()
        self._revision: object = None
        self._read = self._reading = False
        self._took = self._due = 0.0

    def segments(self, content: str | Sequence[Segment | str]) -> list[Segment]:
        """Content with the stored chunks in its texts as `Chunk`; the joined texts stay the same."""
        try:
            self._call(self._follow)
        except StoreError as error:
            # Chunks that aren't recognised are computed as plain text, which is as right.
            _log.warning("the store can't be asked for its texts: %s", error)
        parts: list[Segment | str] = [content] if isinstance(content, str) else list(content)
        segments: list[Segment] = []
        for part in parts:
            if isinstance(part, str | Text):
                segments += self._known.segment(part if isinstance(part, str) else part.text)
            else:
                segments.append(part)
        return segments

    def messages(self, messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Chat messages with `segments` done to the content of each. What is none is left for the prompt's builder to refuse."""
        return [self._message(message) for message in messages]

    def _message(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        content = message.get("content") if isinstance(message, Mapping) else None
        return {**message, "content": self.segments(content)} if isinstance(content, Sequence) else message

    def add(self, key: ChunkKey, text: str) -> None:
        """A chunk was just stored. (Before the first use there is nothing to tell: the store will be read then.)"""
        with self._lock:
            if self._read:
                self._keys.add(key)
                self._known.add(key, text)

    def changed(self) -> None:
        """Chunks may just have been deleted: read the store again before the next prompt."""
        with self._lock:
            self._due, self._revision = 0.0, None

    def _follow(self) -> None:
        with self._turn:  # held through a reading in the foreground: whoever comes meanwhile waits for what it finds
            with self._lock:
                if self._reading or time.monotonic() < self._due:
                    return
                revision = self._store.revision() if hasattr(self._store, "revision") else None
                if revision is not None and revision == self._revision:
                    return
                later = self._read and self._took > _PATIENCE
                self._read = self._reading = True
                self._revision = revision
            if later:
                threading.Thread(target=self._catch_up, args=(True,), name="cachetune-texts", daemon=True).start()
            else:
                self._catch_up(False)

    def _catch_up(self, in_background: bool) -> None:
        """Read the store's texts: learn those that are new, forget those that are gone."""
        started = time.monotonic()
        before = set(self._keys)
        try:
            keys: set[ChunkKey] = set()
            namespaces = self._lead_ins.namespaces
            for key, text, _ in chain.from_iterable(self._store.texts(namespace=n) for n in namespaces):
                keys.add(key)
                if key not in before:
                    self._known.add(key, text)
            if gone := before - keys:
                # A chunk that was evicted while a document holds it stays known, for it will be computed and stored again.
                documents = self._store.documents(tenant=namespaces[0].tenant)
                gone -= {key for document in documents for key in document.chunks}
            for key in gone:
                self._known.remove(key)
            with self._lock:
                self._keys = (self._keys | keys) - gone
        except StoreError:
            with self._lock:
                self._revision = None
            if not in_background:
                raise
        finally:
            with self._lock:
                self._reading = False
                self._took = time.monotonic() - started
                self._due = time.monotonic() + 19 * self._took


def _slots(hashes: Hashes) -> npt.NDArray[np.uint32]:
    """A hash's bit of the bitmap: its high bits after mixing, for the low ones of a product are weak."""
    mixed = (hashes ^ (hashes >> np.uint64(32))) * np.uint64(_MIX)
    return (mixed >> np.uint64(64 - _BITMAP_BITS)).astype(np.uint32)


def _level(length: int) -> int:
    """The largest n with ANCHOR * 2**n <= length."""
    return (length // ANCHOR).bit_length() - 1


def _tag(value: int, salt: int) -> int:
    """A hash told apart by what it is the hash of (a level or a length)."""
    return (value ^ (salt * _MIX)) & _MASK


def _digest(text: str) -> bytes:
    return sha256(text.encode("utf-8", "surrogatepass")).digest()


def _describe(text: str) -> _Entry:
    prefix, length, level = PrefixHashes(text), len(text), _level(len(text))
    anchor, head, full = prefix.slices_from(0, [ANCHOR, ANCHOR << level, length])
    return _Entry(anchor, _tag(head, level), length, _tag(full, length), _digest(text))


def _count(table: dict[_K, int], key: _K) -> None:
    table[key] = table.get(key, 0) + 1


def _discount(table: dict[_K, int], key: _K) -> bool:
    """Take one off; False when that leaves the table empty."""
    table[key] -= 1
    if not table[key]:
        del table[key]
    return bool(table)
