"""Known chunks in a prompt's token ids, whatever template, client or tokenizer put them there.

A chunk is stored as it is tokenised alone. Inside of a prompt a tokenizer may join its first or last characters with what stands around
it, and a template may strip blanks, so that a few tokens at its edges are other ones there, or fewer, or more. So a chunk is found by
its interior, all of its tokens but the first and last `EDGE`. The interior has to stand in the prompt token by token; its SHA-256 decides.
Then the edges are compared. Edge tokens that are equal belong to the chunk too. Where they are not equal, they have to spell the same:
a passage that differs from a stored one in its first word, say, is not recognised as that one.

How chunks are kept is in `known_sequences`, how they are found in `chunk_search`.
"""

from __future__ import annotations

import struct
import threading
from array import array
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import suppress
from hashlib import sha256
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from cachetune_rag.errors import PromptError
from cachetune_rag.text.recognising.chunk_search import Found, Records
from cachetune_rag.text.recognising.id_spans import IdSpan
from cachetune_rag.text.recognising.known_sequences import KnownSequences
from cachetune_rag.text.recognising.rolling_hash import Hashes
from cachetune_store.printing import shown

EDGE = 3
"""Tokens at either end of a chunk that a prompt may have in another form."""
ANCHOR = 8
"""Tokens by which the beginning of an interior is found."""
LEAST = ANCHOR + 2 * EDGE
"""Tokens of the shortest chunk that is recognised."""
AROUND = 3 * EDGE
"""How many of a prompt's tokens on each side of an interior are searched for the text of the chunk's edge."""
ALIKE = 16
"""Where several chunks have the interior that was found, and none has exactly the edges there, at most this many are compared."""
CREDIT = 1 << 18
"""See `chunk_search.CREDIT`. Less than for texts: a server's scheduler waits for this search, and a prompt has fewer tokens than
characters."""

Ids = npt.NDArray[np.uint32]
Spell = Callable[[Iterable[int]], str]
"""Gives the text that token ids spell, with ordinary white space in place of the vocabulary's marks for it (`Spelling`)."""

_EDGES = struct.Struct(f"={2 * EDGE}I")
_SIZE = 4  # bytes of a token id
_DIGEST = 32  # bytes of a record before its edges
_PLACE, _COMPARISON = (
    256,
    1024,
)  # cost of a place, and of comparing the spelling of one chunk's edges there, in hashes of slices
_TRIES = 4


class IdRecognizer:
    """Recognises known chunks in token ids: leftmost first, the longest at a place, their interiors verified in full.

    Chunks are known by a key of the caller's (the chunk key); chunks of the same ids stay known until the last of their keys is
    removed. Memory: less than a kilobyte a chunk, whatever its length. Safe to use from many threads; whoever adds a chunk never waits
    for a prompt that is being searched.

    Args:
        spell: says what tokens spell, for chunks whose edges a prompt tokenises differently. None: such chunks are not recognised.
    """

    def __init__(self, spell: Spell | None = None) -> None:
        self._known, self._spell = KnownSequences(ANCHOR, "tokens", CREDIT), spell
        self._writing = threading.Lock()
        self._keys: dict[bytes, Hashable] = {}  # a key of each chunk, by the chunk's record
        self._other_keys: dict[bytes, dict[Hashable, None]] = {}  # its further keys, where chunks have the same ids

    @property
    def cut_short(self) -> int:
        """Prompts so far in which not every place was looked at (see `chunk_search`)."""
        return self._known.cut_short

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._known

    def add(self, key: Hashable, ids: Sequence[int]) -> bool:
        """Make a chunk known under `key`, in place of what that key stood for; False when it is shorter than `LEAST` tokens.

        Raises:
            PromptError: these are no token ids.
        """
        numbers = _checked(ids)
        if len(numbers) < LEAST:
            self.remove(key)
            return False
        entry = self._known.describe(_codes(numbers[EDGE:-EDGE]), _record(numbers))
        with self._writing:
            if self._keys.setdefault(entry.record, key) != key:
                self._other_keys.setdefault(entry.record, {})[key] = None
            before = self._known.add(key, entry)
            if before is not None and before.record != entry.record:
                self._forget_key(key, before.record)
        return True

    def update(self, items: Iterable[tuple[Hashable, Sequence[int]]]) -> int:
        """Add many `(key, ids)`; returns how many are long enough to be recognised."""
        return sum(self.add(key, ids) for key, ids in items)

    def remove(self, key: Hashable) -> bool:
        """Forget the chunk of `key`; False when it was not known."""
        with self._writing:
            before = self._known.remove(key)
            if before is not None:
                self._forget_key(key, before.record)
        return before is not None

    def clear(self) -> None:
        """Forget everything."""
        with self._writing:
            self._known.clear()
            self._keys.clear()
            self._other_keys.clear()

    def find(self, prompt_ids: Sequence[int] | npt.NDArray[np.integer]) -> list[IdSpan]:
        """The known chunks that stand in a prompt, in order and without overlap.

        Raises:
            PromptError: these are no token ids.
        """
        subject = self._subject(prompt_ids)
        self._known.find(subject)
        return subject.spans()

    def knows(self, ids: Sequence[int]) -> bool:
        """Whether these are the token ids of a known chunk.

        Raises:
            PromptError: these are no token ids.
        """
        numbers = _checked(ids)
        return len(numbers) >= LEAST and _record(numbers) in self._keys

    def search(self, prompt_ids: Sequence[int] | npt.NDArray[np.integer]) -> Found:
        """The interiors of the known chunks in a prompt, and what the search cost; see `chunk_search.search`."""
        return self._known.search(self._subject(prompt_ids))

    def _subject(self, prompt_ids: Sequence[int] | npt.NDArray[np.integer]) -> _IdSubject:
        return _IdSubject(_checked(prompt_ids), self._keys, self._spell)

    def _forget_key(self, key: Hashable, record: bytes) -> None:
        others = self._other_keys.get(record)
        if others is None:
            del self._keys[record]
            return
        if self._keys[record] == key:
            self._keys[record] = next(iter(others))
        others.pop(self._keys[record] if key not in others else key)
        if not others:
            del self._other_keys[record]


def _record(ids: Ids) -> bytes:
    """What a chunk is told apart by: the digest of its interior, and its edges."""
    return sha256(ids[EDGE:-EDGE].data).digest() + ids[:EDGE].tobytes() + ids[-EDGE:].tobytes()


_Place = tuple[int, int, int, int, bytes, Hashable]
"""Where an interior begins and ends, how many tokens of its chunk's edges stand before and behind it, the chunk's record and its key."""


class _IdSubject:
    """Token ids that are searched for interiors; see `chunk_search.Subject`."""

    def __init__(self, ids: Ids, keys: dict[bytes, Hashable], spell: Spell | None):
        self.codes = _codes(ids)
        self._ids, self._keys, self._spell = ids, keys, spell
        self._bytes, self._last = ids.tobytes(), len(ids) - EDGE
        self._places: list[_Place] = []

    def confirm(self, start: int, end: int, records: Records) -> tuple[bool, int]:
        """See `Subject`."""
        at, behind = start * _SIZE, end * _SIZE
        digest = sha256(self._bytes[at:behind]).digest()
        if start >= EDGE and end <= self._last:
            # As `_record`: mostly the edges are those of the chunk, too.
            record = digest + self._bytes[at - EDGE * _SIZE : at] + self._bytes[behind : behind + EDGE * _SIZE]
            if record == records if isinstance(records, bytes) else record in records:
                return self._found((start, end, EDGE, EDGE, record, self._keys.get(record))), _PLACE
        return self._confirm_by_spelling(start, end, digest, records)

    def _confirm_by_spelling(self, start: int, end: int, digest: bytes, records: Records) -> tuple[bool, int]:
        """As `confirm`, where no chunk's edges stand beside the interior token by token."""
        before, behind = self._ids[max(0, start - AROUND) : start].tolist(), self._ids[end : end + AROUND].tolist()
        best: _Place | None = None
        compared = most = 0
        for record in (records,) if isinstance(records, bytes) else _some(records):
            if record[:_DIGEST] != digest:
                continue
            compared += 1
            edges = _EDGES.unpack_from(record, _DIGEST)
            left = self._equal(edges[:EDGE], before)
            right = None if left is None else self._equal(edges[EDGE:], behind, mirrored=True)
            if left is None or right is None:
                continue
            if best is None or left + right > most:
                best, most = (start, end, left, right, record, self._keys.get(record)), left + right
        return best is not None and self._found(best), _PLACE + compared * _COMPARISON

    def spans(self) -> list[IdSpan]:
        """The confirmed chunks. A token at which two chunks' edges overlap goes to the first chunk; tokens of an interior stay with it."""
        spans: list[IdSpan] = []
        done = 0
        following = [*(start for start, *_ in self._places), len(self._ids)][1:]
        for (first, last, before, behind, record, key), limit in zip(self._places, following, strict=True):
            start, end = max(first - before, done), min(last + behind, limit)
            if end - last == first - start == EDGE:
                spans.append(IdSpan(start, end, key))
            else:
                edges = _EDGES.unpack_from(record, _DIGEST)
                spans.append(IdSpan(start, end, key, edges[: EDGE - first + start], edges[EDGE + end - last :]))
            done = end
        return spans

    def _found(self, place: _Place) -> bool:
        if place[-1] is None:  # another thread is just removing this chunk
            return False
        self._places.append(place)
        return True

    def _equal(self, edge: tuple[int, ...], beside: list[int], *, mirrored: bool = False) -> int | None:
        """How many of an edge's tokens stand beside an interior, counted outwards from it; None if the text there isn't that of the edge.

        `beside` are the prompt's tokens before the interior, or behind it (`mirrored`).
        """
        inwards = edge if mirrored else edge[::-1]
        nearest = beside if mirrored else beside[::-1]
        equal = 0
        while equal < EDGE and equal < len(nearest) and nearest[equal] == inwards[equal]:
            equal += 1
        if equal == EDGE:
            return equal
        if self._spell is None:
            return None
        wanted, there = self._spell(edge), self._spell(beside)
        same = there.startswith(wanted.rstrip()) if mirrored else there.endswith(wanted.lstrip())
        return equal if same else None


def _some(records: dict[bytes, int]) -> list[bytes]:
    """A few of the records, which may change meanwhile."""
    for _ in range(_TRIES):
        with suppress(RuntimeError):
            return list(islice(records, ALIKE))
    return []


def _checked(ids: Sequence[int] | npt.NDArray[np.integer]) -> Ids:
    numbers: npt.NDArray[Any]
    try:
        if isinstance(ids, list | tuple) and ids:
            # A server's prompt is a list. NumPy alone takes several times as long to read one.
            return np.frombuffer(array("I", ids), np.uint32)
        numbers = np.asarray(ids)
    except (TypeError, OverflowError):
        numbers = np.empty(1)
    if numbers.ndim == 1 and not numbers.size:
        return np.empty(0, np.uint32)
    if numbers.ndim != 1 or numbers.dtype.kind not in "iu" or numbers.min() < 0 or numbers.max() >= 1 << 32:
        raise PromptError(f"token ids are {shown(ids)}: use a list of ints from 0 to {(1 << 32) - 1}.")
    return numbers.astype(np.uint32)


def _codes(ids: Ids) -> Hashes:
    return ids.astype(np.uint64) + np.uint64(1)  # all runs of zeros would have the same hash
