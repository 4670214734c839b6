"""Known chunk texts in plain strings. How they are kept is in `known_sequences`, how they are found in `chunk_search`.

The SHA-256 of a text decides whether it stands somewhere: the store trusts that digest for its keys too.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from hashlib import sha256

import numpy as np

from cachetune_rag.text.prompts.prompt import Chunk, Segment, Text
from cachetune_rag.text.recognising.bitmap import Bitmap
from cachetune_rag.text.recognising.chunk_search import Found, Records
from cachetune_rag.text.recognising.known_sequences import Entry, KnownSequences
from cachetune_rag.text.recognising.rolling_hash import Hashes

ANCHOR = 32
"""Characters by which the beginning of a chunk is found; shorter chunks are never recognised (they save nothing)."""


class ChunkRecognizer:
    """Recognises known chunk texts in a string: leftmost first, the longest at a place, verified in full.

    Chunks are known by a key of the caller's (the chunk key), so a text may be added under several keys and stays known
    until the last is removed. Memory: about half a kilobyte a chunk, whatever its length. Safe to use from many threads.
    """

    def __init__(self) -> None:
        self._known = KnownSequences(ANCHOR, "characters")

    @property
    def anchor_bits(self) -> Bitmap:
        """The bitmap of the beginnings of known texts; see `KnownSequences`."""
        return self._known.anchor_bits

    @property
    def cut_short(self) -> int:
        """Prompts so far in which not every place was looked at (see `chunk_search`)."""
        return self._known.cut_short

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._known

    def add(self, key: Hashable, text: str) -> bool:
        """Make `text` known under `key`, in place of what that key stood for; False when it is too short to recognise."""
        return self.update([(key, text)]) == 1

    def update(self, items: Iterable[tuple[Hashable, str]]) -> int:
        """Add many `(key, text)`; returns how many are long enough to be recognised."""
        known = 0
        for key, text in items:
            if len(text) < ANCHOR:
                self._known.remove(key)
            else:
                self._known.add(key, self._describe(text))
                known += 1
        return known

    def remove(self, key: Hashable) -> bool:
        """Forget the chunk of `key`; False when it was not known."""
        return self._known.remove(key) is not None

    def clear(self) -> None:
        """Forget everything."""
        self._known.clear()

    def knows(self, text: str) -> bool:
        """Whether exactly this text is known."""
        return len(text) >= ANCHOR and self._known.knows(self._describe(text))

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
        return self._known.find(_TextSubject(prompt)) if prompt else []

    def search(self, prompt: str) -> Found:
        """See `chunk_search.search`."""
        return self._known.search(_TextSubject(prompt))

    def _describe(self, text: str) -> Entry:
        return self._known.describe(_codes(text), _digest(text))


class _TextSubject:
    """A text that is searched; see `chunk_search.Subject`."""

    def __init__(self, text: str):
        self.codes = _codes(text)
        self._text = text

    def confirm(self, start: int, end: int, records: Records) -> tuple[bool, int]:
        """See `Subject`."""
        digest = _digest(self._text[start:end])
        return (digest == records if isinstance(records, bytes) else digest in records), 0


def _codes(text: str) -> Hashes:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)


def _digest(text: str) -> bytes:
    return sha256(text.encode("utf-8", "surrogatepass")).digest()
