"""Which sequences are known (chunks' texts, or their token ids), kept so that a prompt can be searched for all of them at once.

Three hashes of each sequence are kept. That of its first elements (the anchor) says where a sequence may begin. That of its longest
prefix whose length is the anchor times a power of two leaves few possible lengths there. The third is that of the whole sequence.
The caller's record is kept beside them, and decides: it holds a cryptographic digest of the sequence, so this index need not keep
the sequence itself.

Searching takes no lock: adding a chunk never waits for a search, nor a search for an addition. This is safe because every table maps
hashes to values that are replaced and never changed in place (or that are copied in one atomic step before they are read), and because
a place counts only if its record matches. If a table changes during a search, the search may miss a chunk that was just being added or
removed, but never finds a wrong one.
"""

from __future__ import annotations

import logging
import struct
import threading
from collections.abc import Hashable
from typing import NamedTuple, TypeVar

from cachetune_rag.text.recognising.bitmap import Bitmap
from cachetune_rag.text.recognising.chunk_search import (
    CREDIT,
    Found,
    Known,
    Lengths,
    Records,
    Subject,
    lengths_of,
    level_of,
    search,
    tag_of,
)
from cachetune_rag.text.recognising.rolling_hash import Hashes, PrefixHashes

STALE = 1 << 18
"""The bitmaps are made anew once about this many of their bits belong to no chunk any more."""

_PACKED = struct.Struct("<QQQI")
_K = TypeVar("_K")
_log = logging.getLogger(__name__)


class Entry(NamedTuple):
    """A known sequence.

    Attributes:
        anchor, group, full: its hashes.
        length: elements of the sequence.
        record: the caller's record of it.
    """

    anchor: int
    group: int
    full: int
    length: int
    record: bytes


class KnownSequences:
    """Sequences by a key of the caller's; one that was added under several keys stays known until the last is removed.

    Args:
        anchor: elements by which the beginning of a sequence is found; shorter sequences can't be added.
        unit: what its elements are called in messages.
        credit: see `chunk_search.CREDIT`.

    Attributes:
        anchor_bits: the bitmap of the beginnings of known sequences. Bits of sequences that were removed stay until they are `STALE`.
        cut_short: prompts so far in which not every place was looked at (see `chunk_search`).
    """

    def __init__(self, anchor: int, unit: str, credit: int = CREDIT) -> None:
        self._anchor, self._unit, self._credit = anchor, unit, credit
        self._writing, self._counting = threading.Lock(), threading.Lock()
        self._entries: dict[Hashable, bytes] = {}  # packed: as tuples of numbers they would take three times the memory
        self._anchors: dict[int, int] = {}  # hash of the first elements -> sequences that begin so
        self._groups: dict[int, Lengths] = {}  # tag of its longest prefix of a level -> lengths of the sequences
        self._records: dict[int, Records] = {}  # tag of the whole -> its record, or several with their sequences
        self._level_counts: dict[int, int] = {}
        self._levels: tuple[int, ...] = ()
        self._length_counts: dict[
            int, dict[int, int]
        ] = {}  # of groups with more than one sequence: length -> sequences
        self.anchor_bits, self._group_bits, self._record_bits = Bitmap(), Bitmap(), Bitmap()
        self._stale = 0
        self.cut_short = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._entries

    def describe(self, codes: Hashes, record: bytes) -> Entry:
        """What is kept of a sequence. It is given as a number for each element, and has to be at least as long as the anchor."""
        prefix, length = PrefixHashes(codes), len(codes)
        level = level_of(length, self._anchor)
        anchor, head, full = prefix.slices_from(0, [self._anchor, self._anchor << level, length])
        return Entry(anchor, tag_of(head, level), tag_of(full, length), length, record)

    def add(self, key: Hashable, entry: Entry) -> Entry | None:
        """Make a sequence known under `key`; returns the one that this key stood for before."""
        with self._writing:
            before = self._forget(key)
            self._learn(key, entry)
        return before

    def remove(self, key: Hashable) -> Entry | None:
        """Forget the sequence of `key` and return it; None when there was none."""
        with self._writing:
            return self._forget(key)

    def clear(self) -> None:
        """Forget everything."""
        with self._writing:
            for key in list(self._entries):
                self._forget(key)
            self._sweep()

    def knows(self, entry: Entry) -> bool:
        """Whether a sequence with these hashes and this record is known."""
        records = self._records.get(entry.full, b"")
        return entry.record == records if isinstance(records, bytes) else entry.record in records

    def search(self, subject: Subject) -> Found:
        """See `chunk_search.search`."""
        if len(subject.codes) < self._anchor or not self._entries:
            return Found([])
        known = Known(
            self._anchor,
            self._anchors,
            self._groups,
            self._records,
            self._levels,
            self.anchor_bits,
            self._group_bits,
            self._record_bits,
            self._credit,
        )
        return search(subject, known)

    def find(self, subject: Subject) -> list[tuple[int, int]]:
        """Where known sequences stand: `[start, end)`, in order and without overlap. Counts and logs prompts not searched in full."""
        found = self.search(subject)
        if found.left_out:
            with self._counting:
                self.cut_short += 1
                first = self.cut_short == 1
            _log.log(
                logging.WARNING if first else logging.DEBUG,
                "a prompt of %d %s repeats the beginnings of stored chunks so often that %d places in it were not looked "
                "at: what stands there is computed as plain text%s",
                len(subject.codes),
                self._unit,
                found.left_out,
                ". This is said once; stats() counts such prompts" if first else "",
            )
        return found.places

    # -- inside, under the lock of writers -----------------------------------------------------------------------

    def _learn(self, key: Hashable, entry: Entry) -> None:
        self._entries[key] = _PACKED.pack(*entry[:-1]) + entry.record
        # The table that searches read first is filled last, so a search at the same time sees all of a sequence or nothing.
        self._learn_record(entry)
        self._learn_length(entry)
        level = level_of(entry.length, self._anchor)
        self._level_counts[level] = self._level_counts.get(level, 0) + 1
        if level not in self._levels:
            self._levels = tuple(sorted(self._level_counts, reverse=True))
        self._anchors[entry.anchor] = self._anchors.get(entry.anchor, 0) + 1
        self._record_bits.mark(entry.full)
        self._group_bits.mark(entry.group)
        self.anchor_bits.mark(entry.anchor)

    def _learn_record(self, entry: Entry) -> None:
        before = self._records.get(entry.full)
        if before is None:
            self._records[entry.full] = entry.record
        elif isinstance(before, dict):
            # Changed in place, since there may be many; searches copy them in one atomic step.
            before[entry.record] = before.get(entry.record, 0) + 1
        else:
            counts = {before: 1}
            counts[entry.record] = counts.get(entry.record, 0) + 1
            self._records[entry.full] = counts

    def _learn_length(self, entry: Entry) -> None:
        before = self._groups.get(entry.group)
        if before is None:
            self._groups[entry.group] = entry.length
            return
        counts = self._length_counts.setdefault(entry.group, dict.fromkeys(lengths_of(before), 1))
        counts[entry.length] = counts.get(entry.length, 0) + 1
        if counts[entry.length] == 1:
            self._groups[entry.group] = tuple(sorted(counts, reverse=True))

    def _forget(self, key: Hashable) -> Entry | None:
        packed = self._entries.pop(key, None)
        if packed is None:
            return None
        anchor, group, full, length = _PACKED.unpack_from(packed)
        entry = Entry(anchor, group, full, length, packed[_PACKED.size :])
        if not _discount(self._anchors, entry.anchor):
            self._stale += 1
        level = level_of(entry.length, self._anchor)
        if not _discount(self._level_counts, level):
            self._levels = tuple(sorted(self._level_counts, reverse=True))
        self._forget_length(entry)
        self._forget_record(entry)
        if self._stale > STALE:
            self._sweep()
        return entry

    def _forget_length(self, entry: Entry) -> None:
        counts = self._length_counts.get(entry.group)
        if counts is None:
            del self._groups[entry.group]
        elif not _discount(counts, entry.length):
            if counts:
                self._groups[entry.group] = tuple(sorted(counts, reverse=True))
            else:
                del self._groups[entry.group], self._length_counts[entry.group]

    def _forget_record(self, entry: Entry) -> None:
        before = self._records[entry.full]
        if isinstance(before, bytes) or (not _discount(before, entry.record) and not before):
            del self._records[entry.full]

    def _sweep(self) -> None:
        """Make the bitmaps anew from the tables. A removed sequence's bits can't just be cleared, since other sequences may share them;
        until now each stale bit has only cost a needless look into a table.
        """
        self.anchor_bits, self._group_bits = Bitmap(self._anchors), Bitmap(self._groups)
        self._record_bits = Bitmap(self._records)
        self._stale = 0


def _discount(table: dict[_K, int], key: _K) -> bool:
    """Lower the count of `key` by one; False when that was the last."""
    table[key] -= 1
    if not table[key]:
        del table[key]
        return False
    return True
