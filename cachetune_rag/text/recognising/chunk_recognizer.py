"""Which chunk texts are known, kept so that a prompt can be searched for all of them at once (`chunk_search`).

Of a text, four hashes are kept: of its first `ANCHOR` characters, which say where a chunk may begin; of its longest prefix of
`ANCHOR` times a power of two, which leaves the few lengths that a chunk may have there; of the whole; and the SHA-256 of the
whole, which decides. That digest is what the store trusts for its keys too, and it lets this index do without the texts.

Searching takes no lock, so that whoever adds a chunk never waits for a prompt that is being searched, nor the other way round.
It works because every table maps hashes to values that are replaced and never changed, and because a place counts only if its
digest does: a table that changes during a search can cost a chunk that just came or went, never a wrong one.
"""

from __future__ import annotations

import logging
import struct
import threading
from collections.abc import Hashable, Iterable
from hashlib import sha256
from typing import NamedTuple, TypeVar

from cachetune_rag.text.prompts.prompt import Chunk, Segment, Text
from cachetune_rag.text.recognising.bitmap import Bitmap
from cachetune_rag.text.recognising.chunk_search import (
    ANCHOR,
    Found,
    Known,
    Lengths,
    lengths_of,
    level_of,
    search,
    tag_of,
)
from cachetune_rag.text.recognising.rolling_hash import PrefixHashes

STALE = 1 << 18
"""The bitmaps are made anew once so many of their bits belong to no chunk any more."""

_PACKED = struct.Struct("<QQQI32s")
_K = TypeVar("_K")
_log = logging.getLogger(__name__)


class _Entry(NamedTuple):
    anchor: int
    group: int
    full: int
    length: int
    digest: bytes


class ChunkRecognizer:
    """Recognises known chunk texts in a string: leftmost first, the longest at a place, verified in full.

    Chunks are known by a key of the caller's (the chunk key), so a text may be added under several keys and stays known
    until the last is removed. Memory: about half a kilobyte a chunk, whatever its length. Safe to use from many threads.

    Attributes:
        anchor_bits: the bitmap of the beginnings of known chunks. Bits of chunks that were removed stay until they are `STALE`.
        cut_short: prompts so far in which not every place was looked at (see `chunk_search`).
    """

    def __init__(self) -> None:
        self._writing = threading.Lock()
        self._entries: dict[Hashable, bytes] = {}  # packed: as tuples of numbers they would take three times the memory
        self._anchors: dict[int, int] = {}  # hash of the first ANCHOR characters -> chunks that begin so
        self._groups: dict[int, Lengths] = {}  # tag of its longest prefix of a level -> lengths of the chunks
        self._texts: dict[
            int, bytes | dict[bytes, int]
        ] = {}  # tag of the whole -> SHA-256, or several with their chunks
        self._level_counts: dict[int, int] = {}
        self._levels: tuple[int, ...] = ()
        self._length_counts: dict[int, dict[int, int]] = {}  # of groups with more than one chunk: length -> chunks
        self.anchor_bits, self._group_bits, self._text_bits = Bitmap(), Bitmap(), Bitmap()
        self._stale = 0
        self.cut_short = 0

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
            with self._writing:
                self._forget(key)
                if entry is not None:
                    self._learn(key, entry)
                    known += 1
        return known

    def remove(self, key: Hashable) -> bool:
        """Forget the chunk of `key`; False when it was not known."""
        with self._writing:
            return self._forget(key)

    def clear(self) -> None:
        """Forget everything."""
        with self._writing:
            for key in list(self._entries):
                self._forget(key)
            self._sweep()

    def knows(self, text: str) -> bool:
        """Whether exactly this text is known."""
        if len(text) < ANCHOR:
            return False
        entry = _describe(text)
        digests = self._texts.get(entry.full, b"")
        return entry.digest == digests if isinstance(digests, bytes) else entry.digest in digests

    def segment(self, prompt: str) -> list[Segment]:
        """Cut `prompt` into `Text` and `Chunk` segments whose texts joined are exactly `prompt`; none is empty."""
        segments: list[Segment] = []
        done = 0
        for start, end in self.find(prompt):
            if start > done:
                segments.append(Text(prompt[done:start]))
            segments.append(Chunk(prompt[start:end], found=True))
            done = end
        if done < len(prompt):
            segments.append(Text(prompt[done:]))
        return segments

    def find(self, prompt: str) -> list[tuple[int, int]]:
        """Where known chunks stand in `prompt`: `[start, end)` in characters, in order and without overlap."""
        found = self.search(prompt)
        if found.left_out:
            with self._writing:
                self.cut_short += 1
                first = self.cut_short == 1
            _log.log(
                logging.WARNING if first else logging.DEBUG,
                "a prompt of %d characters repeats the beginnings of stored chunks so often that %d places in it were not looked "
                "at: what stands there is computed as plain text%s",
                len(prompt),
                found.left_out,
                ". This is said once; stats() counts such prompts" if first else "",
            )
        return found.places

    def search(self, prompt: str) -> Found:
        """See `chunk_search.search`."""
        if len(prompt) < ANCHOR or not self._entries:
            return Found([])
        known = Known(
            self._anchors,
            self._groups,
            self._texts,
            self._levels,
            self.anchor_bits,
            self._group_bits,
            self._text_bits,
        )
        return search(prompt, known)

    # -- inside, under the lock of writers -----------------------------------------------------------------------

    def _learn(self, key: Hashable, entry: _Entry) -> None:
        self._entries[key] = _PACKED.pack(*entry)
        # The table that searches look into first is filled last, so a search meanwhile finds all of a chunk or nothing.
        self._learn_text(entry)
        self._learn_length(entry)
        level = level_of(entry.length)
        self._level_counts[level] = self._level_counts.get(level, 0) + 1
        if level not in self._levels:
            self._levels = tuple(sorted(self._level_counts, reverse=True))
        self._anchors[entry.anchor] = self._anchors.get(entry.anchor, 0) + 1
        self._text_bits.mark([entry.full])
        self._group_bits.mark([entry.group])
        self.anchor_bits.mark([entry.anchor])

    def _learn_text(self, entry: _Entry) -> None:
        before = self._texts.get(entry.full)
        if before is None:
            self._texts[entry.full] = entry.digest
            return
        counts = dict(before) if isinstance(before, dict) else {before: 1}
        counts[entry.digest] = counts.get(entry.digest, 0) + 1
        self._texts[entry.full] = counts

    def _learn_length(self, entry: _Entry) -> None:
        before = self._groups.get(entry.group)
        if before is None:
            self._groups[entry.group] = entry.length
            return
        counts = self._length_counts.setdefault(entry.group, dict.fromkeys(lengths_of(before), 1))
        counts[entry.length] = counts.get(entry.length, 0) + 1
        if counts[entry.length] == 1:
            self._groups[entry.group] = tuple(sorted(counts, reverse=True))

    def _forget(self, key: Hashable) -> bool:
        packed = self._entries.pop(key, None)
        if packed is None:
            return False
        entry = _Entry(*_PACKED.unpack(packed))
        if not _discount(self._anchors, entry.anchor):
            self._stale += 1
        level = level_of(entry.length)
        if not _discount(self._level_counts, level):
            self._levels = tuple(sorted(self._level_counts, reverse=True))
        self._forget_length(entry)
        self._forget_text(entry)
        if self._stale > STALE:
            self._sweep()
        return True

    def _forget_length(self, entry: _Entry) -> None:
        counts = self._length_counts.get(entry.group)
        if counts is None:
            del self._groups[entry.group]
        elif not _discount(counts, entry.length):
            if counts:
                self._groups[entry.group] = tuple(sorted(counts, reverse=True))
            else:
                del self._groups[entry.group], self._length_counts[entry.group]

    def _forget_text(self, entry: _Entry) -> None:
        before = self._texts[entry.full]
        if isinstance(before, dict):
            counts = dict(before)
            _discount(counts, entry.digest)
            if counts:
                self._texts[entry.full] = counts
                return
        del self._texts[entry.full]

    def _sweep(self) -> None:
        """Other chunks may share a bit, so those of chunks that are gone stay; a stale one only costs a look into the table."""
        self.anchor_bits, self._group_bits = Bitmap(self._anchors), Bitmap(self._groups)
        self._text_bits = Bitmap(self._texts)
        self._stale = 0


def _describe(text: str) -> _Entry:
    prefix, length, level = PrefixHashes(text), len(text), level_of(len(text))
    anchor, head, full = prefix.slices_from(0, [ANCHOR, ANCHOR << level, length])
    digest = sha256(text.encode("utf-8", "surrogatepass")).digest()
    return _Entry(anchor, tag_of(head, level), tag_of(full, length), length, digest)


def _discount(table: dict[_K, int], key: _K) -> bool:
    """Lower the count of `key` by one; False when that was the last."""
    table[key] -= 1
    if not table[key]:
        del table[key]
        return False
    return True
