"""Cuts a text into chunks with a limited number of tokens, at the best places, without losing a character."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import pairwise

from cachetune_rag.checking.arguments import check_count
from cachetune_rag.errors import ConfigError
from cachetune_store.printing import shown

DEFAULT_CHUNK_TOKENS = 512
MIN_CHUNK_TOKENS = 8

# Where a text may be cut, best places first. White space stays with the paragraph or sentence before it. A line keeps its indentation, and a
# word the space before it, as in tokenizers. Each pattern looks at a run of white space only once, so that cutting takes linear time.
_BOUNDARIES = (
    re.compile(r"\n[^\S\n]*\n\s*"),
    re.compile(r"(?:(?<=[.!?…])|(?<=[.!?…][\"'”’»)\]]))\s+|(?<=[。！？])(?![。！？”’」』）])"),
    re.compile(r"\n"),  # rows of a table and lines of code have no sentences
    re.compile(r"(?<=\S)(?=\s)"),
)
_LONGEST_TOKEN = 16
"""The most characters of a token in ordinary text. A piece with more characters than the limit allows is cut without counting tokens."""


class Splitter:
    """Cuts texts at paragraphs, long paragraphs at sentences, long sentences (tables, code) at lines, and long lines at words.

    Args:
        count: returns the number of tokens of a text that is tokenised alone.
        chunk_tokens: most tokens of a chunk, at least `MIN_CHUNK_TOKENS`. Only a single character that takes more tokens makes
            a larger chunk.

    Raises:
        ConfigError: chunk_tokens is too small, or an argument is of another type.
    """

    def __init__(self, count: Callable[[str], int], chunk_tokens: int = DEFAULT_CHUNK_TOKENS):
        if not callable(count):
            raise ConfigError(f"count is {shown(count)}: use a function that gives the number of tokens of a text.")
        check_count(chunk_tokens, "chunk tokens", f"{MIN_CHUNK_TOKENS} or more (512 is a good size)", MIN_CHUNK_TOKENS)
        self._count, self._limit = count, chunk_tokens

    def split(self, text: str) -> list[str]:
        """The chunks of `text`. None is empty, and joined they are exactly `text`. The same text always gives the same chunks."""
        if not isinstance(text, str):
            raise ConfigError(f"text is {shown(text)}, a {type(text).__name__}: use a string.")
        chunks: list[str] = []
        pieces: list[tuple[str, int]] = []
        exact, extra = (
            0,
            0,
        )  # tokens of the joined pieces when last counted; tokens of the pieces since, counted one by one
        for piece, tokens in self._pieces(text, 0):
            if pieces and exact + extra + tokens > self._limit:
                # Pieces usually take fewer tokens when they are joined, so they are counted again before the chunk is closed.
                exact, extra = self._count(_joined(pieces)), 0
                if exact + tokens > self._limit:
                    pieces = self._close(pieces, chunks)
                    exact, extra = 0, sum(n for _, n in pieces)
            pieces.append((piece, tokens))
            extra += tokens
        while pieces:
            pieces = self._close(pieces, chunks)
        return chunks

    def _close(self, pieces: list[tuple[str, int]], chunks: list[str]) -> list[tuple[str, int]]:
        """Make a chunk of `pieces`. Returns the pieces that didn't fit: a few texts take more tokens when they are joined."""
        end = len(pieces)
        while end > 1 and self._count(_joined(pieces[:end])) > self._limit:
            end -= 1
        chunks.append(_joined(pieces[:end]))
        return pieces[end:]

    def _pieces(self, text: str, level: int) -> Iterator[tuple[str, int]]:
        """The largest pieces that fit, with their numbers of tokens. The text is cut at `level`, and pieces that are too long at the next one."""
        for piece in _cut(text, level, self._limit):
            tokens = self._count(piece) if len(piece) <= self._limit * _LONGEST_TOKEN else self._limit + 1
            if tokens <= self._limit or len(piece) == 1:
                yield piece, tokens
            elif level < len(_BOUNDARIES):
                yield from self._pieces(piece, level + 1)
            else:
                half = len(piece) // 2
                yield from self._pieces(piece[:half], level)
                yield from self._pieces(piece[half:], level)


def _joined(pieces: list[tuple[str, int]]) -> str:
    return "".join(piece for piece, _ in pieces)


def _cut(text: str, level: int, width: int) -> Iterator[str]:
    """`text` cut at every boundary of `level`; after the last level, every `width` characters."""
    if level < len(_BOUNDARIES):
        ends: Iterator[int] = (match.end() for match in _BOUNDARIES[level].finditer(text))
    else:
        ends = iter(range(width, len(text), width))
    for start, end in pairwise(_with_ends(ends, len(text))):
        if end > start:
            yield text[start:end]


def _with_ends(cuts: Iterator[int], length: int) -> Iterator[int]:
    yield 0
    yield from cuts
    yield length
