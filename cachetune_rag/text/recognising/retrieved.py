"""Finding what was just retrieved inside a prompt, whether it is stored or not.

In plain text, only stored chunks are found. So nothing would ever be reused with an index that was made without the KV store, or that
shows other texts than were precomputed (a window around a sentence, a parent). A caller who knows what the retriever returned, and
which document each passage belongs to, gives the passages as `Chunk`s. A passage that stands unchanged in the prompt becomes one of
its chunks: the request computes it and stores it under its document, and the next request finds it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate

from cachetune_rag.text.prompts.segments import Chunk, Segment, Text

SHORTEST = 32
"""Passages of fewer characters are never found in plain text (they save nothing)."""

_COVERED = 0.75
"""A passage of which stored chunks make up at least this share gives way to these chunks."""

Content = str | Sequence[Segment | str]


class Retrieved:
    """The passages that a request's retriever returned.

    Args:
        passages: only `Chunk`s that name a document are looked for; plain texts are ignored here.
        stored: cuts content into text and stored chunks.
    """

    def __init__(self, passages: Sequence[str | Chunk], stored: Callable[[Content], list[Segment]]):
        self._stored = stored
        self._documents: dict[str, Chunk] = {}
        for passage in passages:
            if isinstance(passage, Chunk) and passage.document is not None and len(passage.text) >= SHORTEST:
                self._documents.setdefault(passage.text, replace(passage, found=True))

    def segments(self, content: Content) -> list[Segment]:
        """Content with stored and retrieved chunks as `Chunk`; the joined texts stay the same.

        Of chunks that overlap, the one that begins first counts, and of several that begin there, the longest. But where stored chunks
        make up most of a passage (children of a parent, a chunk behind a number), these chunks count and the passage doesn't, so that
        nothing is stored twice.
        """
        if not self._documents:
            return self._stored(content)
        parts = [content] if isinstance(content, str) else list(content)
        segments: list[Segment] = []
        for part in parts:
            if isinstance(part, str | Text):
                segments += self._cut(part if isinstance(part, str) else part.text)
            else:
                segments += self._stored([part])
        return segments

    def _cut(self, text: str) -> list[Segment]:
        segments = self._stored(text)
        known = _spans(segments)
        mine = [span for span in self._find(text) if not _is_taken(span, known)]
        if not mine:
            return segments
        segments, done = [], 0
        for start, end in mine:
            if start > done:
                segments += self._stored(text[done:start])
            segments.append(self._documents[text[start:end]])
            done = end
        return segments + (self._stored(text[done:]) if done < len(text) else [])

    def _find(self, text: str) -> list[tuple[int, int]]:
        """Where the passages stand in `text`, in order and without overlap."""
        found: list[tuple[int, int]] = []
        for passage in self._documents:
            start = text.find(passage)
            while start >= 0:
                found.append((start, start + len(passage)))
                start = text.find(passage, start + len(passage))
        chosen: list[tuple[int, int]] = []
        for start, end in sorted(found, key=lambda span: (span[0], -span[1])):
            if not chosen or start >= chosen[-1][1]:
                chosen.append((start, end))
        return chosen


def _spans(segments: Sequence[Segment]) -> list[tuple[int, int]]:
    ends = list(accumulate(len(segment.text) for segment in segments))
    return [
        (end - len(segment.text), end)
        for segment, end in zip(segments, ends, strict=True)
        if isinstance(segment, Chunk)
    ]


def _is_taken(span: tuple[int, int], stored: Sequence[tuple[int, int]]) -> bool:
    """Whether stored chunks already cover the place of a passage."""
    start, end = span
    if any(a < start < b or (a == start and b >= end) for a, b in stored):
        return True
    return sum(b - a for a, b in stored if start <= a and b <= end) >= _COVERED * (end - start)
