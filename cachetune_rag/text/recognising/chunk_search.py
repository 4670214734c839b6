"""Searching one prompt for all known chunks: a text for their texts, or token ids for theirs. Elements are characters or tokens.

One vectorised pass gives the polynomial prefix hash of the prompt, from which the hash of any slice costs a subtraction and
two multiplications. A bitmap over the hashes of every chunk's first elements (the anchor) then leaves the few places where a
chunk may begin. Only there, longer prefixes (twice, four times the anchor, ...) narrow the chunks down to those of a few
lengths, so many chunks that share a header cost no more than one that doesn't.

Stored texts and prompts may be made by an attacker, or be a table of a thousand dashes: then a chunk may begin at
every place, and have any of a thousand lengths. Two things keep the search linear in the prompt. After several places in a row
without a chunk, many places are looked at in one vectorised step. And the hashes of slices are counted: a search may compute
`CREDIT` of them for any prompt, and `RATE` more for each element that it has passed. Where these are used up, the next places are
skipped until it has passed enough elements; chunks behind the skipped places are found again.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from cachetune_rag.text.recognising.bitmap import MIX, Bitmap
from cachetune_rag.text.recognising.rolling_hash import Hashes, PrefixHashes

CREDIT = 1 << 20
RATE = 16
"""The search's limit, in hashes of slices: any prompt may cost `CREDIT`, and each element adds `RATE`. A hash takes about 12 ns."""

_ONE_BY_ONE = 64  # cost of looking at a single place, in hashes
_CALL = 1024  # fixed cost of looking at many places at once, in hashes
_RESERVE = 1 << 17  # hashes that must be allowed again before a stopped search goes on
_PATIENCE = 8  # places without a chunk, in a row, after which many are looked at at once
_FIRST_BLOCK, BLOCK = 64, 8192  # places
_LAST_BLOCK = 1024  # places that are looked at ahead at most
AT_A_TIME = 1 << 17  # hashes in memory
_STRETCH = 1 << 14  # elements whose hashes stay in the processor's cache

_MASK = (1 << 64) - 1

Lengths = int | tuple[int, ...]
"""A length, or several, longest first. Most chunks share their first elements with no other chunk; a single number takes less memory."""
Records = bytes | dict[bytes, int]
"""The record of a chunk; or, where several have the same hash, a dict of their records with how often each was added. The dict may
change at any moment: only test membership, or copy it with `list`, which is atomic."""
Places = npt.NDArray[np.intp]


class Subject(Protocol):
    """What is searched."""

    @property
    def codes(self) -> Hashes:
        """A number for each of its elements."""

    def confirm(self, start: int, end: int, records: Records) -> tuple[bool, int]:
        """Check whether [start, end) is, in full, a chunk that has one of the records. Returns the answer, and the cost of the check
        beyond reading the slice once, in hashes of slices. A chunk that is confirmed is always part of the search's result.
        """


@dataclass(frozen=True)
class Known:
    """What is known of the chunks (`KnownSequences`). It may grow and shrink during a search.

    Attributes:
        anchor: elements by which the beginning of a chunk is found.
        anchors: by the hash of the first `anchor` elements, how many chunks begin with them.
        groups: by the tag of its longest prefix of `anchor` << level elements, the lengths of the chunks that have it.
        records: by the tag of the whole chunk, its record or records.
        levels: those that occur among the chunks (see `level_of`), the highest first.
        anchor_bits, group_bits, record_bits: bitmaps of the keys of anchors, groups and records.
        credit: hashes of slices that any prompt may cost.
    """

    anchor: int
    anchors: Mapping[int, int]
    groups: Mapping[int, Lengths]
    records: Mapping[int, Records]
    levels: tuple[int, ...]
    anchor_bits: Bitmap
    group_bits: Bitmap
    record_bits: Bitmap
    credit: int = CREDIT


class Found(NamedTuple):
    """What a search found.

    Attributes:
        places: where chunks stand, `[start, end)`.
        left_out: how many places where a chunk may begin were not looked at, because the search had reached its limit.
        hashes: about how many hashes of slices the search cost, beyond one pass over the prompt.
    """

    places: list[tuple[int, int]]
    left_out: int = 0
    hashes: int = 0


def search(subject: Subject, known: Known) -> Found:
    """Known chunks in a prompt: leftmost first, the longest at a place, verified in full, without overlap."""
    return _Search(subject, known).run()


def level_of(length: int, anchor: int) -> int:
    """The largest n with anchor * 2**n <= length."""
    return (length // anchor).bit_length() - 1


def tag_of(value: int, salt: int) -> int:
    """A hash mixed with a level or length, so that equal hashes at different levels or lengths have different tags."""
    return (value ^ (salt * MIX)) & _MASK


def lengths_of(lengths: Lengths) -> tuple[int, ...]:
    """All of them, longest first."""
    return lengths if isinstance(lengths, tuple) else (lengths,)


class _Search:
    def __init__(self, subject: Subject, known: Known):
        self._subject, self._known, self._length = subject, known, len(subject.codes)
        self._prefix = PrefixHashes(subject.codes)
        self._spent = 0
        self._from = self._to = 0
        self._likely_at: list[list[tuple[int, Records]] | None] = []  # for the rows from `_from` to `_to`

    def run(self) -> Found:
        places = self._starts()
        starts: list[int] = places.tolist()
        found: list[tuple[int, int]] = []
        row = left_out = vain = 0
        block = _FIRST_BLOCK
        while row < len(starts):
            start = starts[row]
            if self._used_up(start):
                # Skip far enough to pay for many places at once; otherwise every place would be tried and given up again.
                paid_at = (self._spent - self._known.credit + _RESERVE) // RATE
                after = bisect_right(starts, paid_at)
                left_out += after - row
                row = after
                continue
            if vain >= _PATIENCE:
                looked = self._in_vain(places[row : row + block])
                block = min(2 * block, BLOCK) if looked == block else _FIRST_BLOCK
                if looked:
                    row += looked
                    continue
            end = self._longest_at(places, row, start)
            if end is None:
                row, vain = row + 1, vain + 1
            else:
                found.append((start, end))
                row, vain, block = bisect_left(starts, end, row), 0, _FIRST_BLOCK
        return Found(found, left_out, self._spent)

    def _used_up(self, start: int) -> bool:
        """Whether the search has cost more hashes than the prompt up to this place allows."""
        return self._spent > self._known.credit + RATE * start

    def _starts(self) -> Places:
        """Places where the bitmap and then the table of anchors say that a chunk may begin."""
        anchor, anchors, found = self._known.anchor, self._known.anchors, []
        for first in range(0, self._length - anchor + 1, _STRETCH):
            hashes = self._prefix.slices(anchor, first, first + _STRETCH)
            maybe = np.flatnonzero(self._known.anchor_bits.may_hold(hashes))
            sure = np.fromiter((each in anchors for each in hashes[maybe].tolist()), np.bool_, len(maybe))
            found.append(maybe[sure] + first)
        return np.concatenate(found)

    def _longest_at(self, places: Places, row: int, start: int) -> int | None:
        """The end of the longest chunk at a place, which is that of a row."""
        self._spent += _ONE_BY_ONE
        if not self._from <= row < self._to:
            self._look_at(places, row)
        likely = self._likely_at[row - self._from]
        if likely is None:
            return self._longest_of_many(start)
        for length, records in likely:
            if self._confirmed(start, start + length, records):
                return start + length
            if self._used_up(start):
                return None
        return None

    def _look_at(self, places: Places, row: int) -> None:
        """Find for a block of places at once, from a row on, which chunks may stand there by their hashes, the longest first; None where
        chunks of many lengths may."""
        # Blocks grow as long as one is needed right behind another; behind a long chunk, most of a large one would be for nothing.
        near = self._from < row < self._to + _FIRST_BLOCK
        size = min(2 * (self._to - self._from), _LAST_BLOCK) if near else _FIRST_BLOCK
        some = places[row : row + size]
        self._from, self._to = row, row + len(some)
        found: list[list[tuple[int, Records]] | None] = [[] for _ in range(len(some))]
        which: list[int] = []
        lengths: list[int] = []
        for level in self._known.levels:
            size = self._known.anchor << level
            inside = int(np.searchsorted(some, self._length - size, side="right"))
            tags = _tags(self._prefix.slices_at(some[:inside], size), level)
            maybe = np.flatnonzero(self._known.group_bits.may_hold(tags))
            for number, tag in zip(maybe.tolist(), tags[maybe].tolist(), strict=True):
                group = self._known.groups.get(tag)
                if isinstance(group, int):
                    which.append(number)
                    lengths.append(group)
                elif group is not None and len(group) <= _PATIENCE:
                    which += [number] * len(group)
                    lengths += group
                elif group is not None:
                    found[number] = None
        if which:
            rows, sizes = np.array(which, dtype=np.intp), np.array(lengths, dtype=np.intp)
            starts = some[rows]
            fits = starts + sizes <= self._length
            rows, sizes, starts = rows[fits], sizes[fits], starts[fits]
            tags = _tags(self._prefix.between(starts, starts + sizes), sizes.astype(np.uint64))
            maybe = np.flatnonzero(self._known.record_bits.may_hold(tags))
            for number, length, tag in zip(
                rows[maybe].tolist(), sizes[maybe].tolist(), tags[maybe].tolist(), strict=True
            ):
                records, there = self._known.records.get(tag), found[number]
                if records is not None and there is not None:
                    there.append((length, records))
        self._likely_at = found

    def _longest_of_many(self, start: int) -> int | None:
        """As `_longest_at`, where chunks of many lengths may begin."""
        anchor, levels = self._known.anchor, self._known.levels
        levels = tuple(level for level in levels if start + (anchor << level) <= self._length)
        heads = self._prefix.slices_from(start, [anchor << level for level in levels])
        for level, head in zip(levels, heads, strict=True):
            group = self._known.groups.get(tag_of(head, level))
            if group is None:
                continue
            fitting = [length for length in lengths_of(group) if start + length <= self._length]
            self._spent += 4 * len(fitting)
            for length, tag in self._likely(start, fitting):
                records = self._known.records.get(tag)
                if records is not None and self._confirmed(start, start + length, records):
                    return start + length
                if self._used_up(start):
                    return None
        return None

    def _likely(self, start: int, lengths: list[int]) -> list[tuple[int, int]]:
        """(length, tag) of the slices at a place that may be whole chunks. Where there are many lengths, the bitmap leaves few of them."""
        if len(lengths) <= _PATIENCE:
            fulls = self._prefix.slices_from(start, lengths)
            return [(length, tag_of(full, length)) for length, full in zip(lengths, fulls, strict=True)]
        array = np.array(lengths, dtype=np.intp)
        tags = _tags(self._prefix.between(np.full_like(array, start), start + array), array.astype(np.uint64))
        likely = np.flatnonzero(self._known.record_bits.may_hold(tags)).tolist()
        return [(lengths[i], int(tags[i])) for i in likely]

    def _confirmed(self, start: int, end: int, records: Records) -> bool:
        confirmed, spent = self._subject.confirm(start, end, records)
        # Reading a confirmed slice is not charged: the search goes on behind it. An unconfirmed one is charged in full: its hash is
        # that of another chunk by chance, or it differs from the chunk at the edges alone.
        self._spent += spent if confirmed else spent + end - start
        return confirmed

    def _in_vain(self, starts: Places) -> int:
        """How many of these places, from the first on, can be passed over because no chunk begins at them."""
        looked = len(starts)
        for level in self._known.levels:
            self._spent += _CALL + looked
            some = starts[:looked]
            size = self._known.anchor << level
            inside = np.flatnonzero(some + size <= self._length)
            tags = _tags(self._prefix.slices_at(some[inside], size), level)
            likely = self._known.group_bits.may_hold(tags)
            rows, tags = inside[likely], tags[likely]
            if len(rows):
                looked = min(looked, self._first_at_level(some, rows, tags))
        return looked

    def _first_at_level(self, starts: Places, rows: Places, tags: Hashes) -> int:
        """The first of the rows at which the hash of a whole chunk matches, or at which looking stopped because the limit was reached."""
        distinct, which = np.unique(tags, return_inverse=True)
        lengths = [lengths_of(self._known.groups.get(tag, ())) for tag in distinct.tolist()]
        sizes = np.array([len(each) for each in lengths], dtype=np.intp)
        flat = np.array([length for each in lengths for length in each], dtype=np.intp)
        self._spent += 4 * len(flat)
        first = np.cumsum(sizes) - sizes
        counts = sizes[which]
        done = np.cumsum(counts)
        at = 0
        while at < len(rows):
            before = int(done[at - 1]) if at else 0
            end = max(at + 1, int(np.searchsorted(done, before + AT_A_TIME, side="right")))
            if self._used_up(int(starts[rows[at]])):
                return int(rows[at])
            some, count = rows[at:end], counts[at:end]
            total = int(done[end - 1]) - before
            self._spent += total
            within = np.arange(total) - np.repeat(done[at:end] - count - before, count)
            length = flat[np.repeat(first[which[at:end]], count) + within]
            place = np.repeat(some, count)
            fits = starts[place] + length <= self._length
            place, length = place[fits], length[fits]
            full = _tags(self._prefix.between(starts[place], starts[place] + length), length.astype(np.uint64))
            for i in np.flatnonzero(self._known.record_bits.may_hold(full)).tolist():
                if int(full[i]) in self._known.records:
                    return int(place[i])
            at = end
        return len(starts)


def _tags(hashes: Hashes, salts: Hashes | int) -> Hashes:
    """`tag_of`, for arrays."""
    mixed = np.uint64(salts * MIX & _MASK) if isinstance(salts, int) else salts * np.uint64(MIX)
    tags: Hashes = hashes ^ mixed
    return tags
