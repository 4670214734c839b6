"""Where a sentence, a row of a table, or a line of code begins in one chunk of a prompt and goes on in the next.

It is told by the chunks' token ids alone, so every way to make a prompt, and every process that has a part of the model, finds the same.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

from cachetune_rag.text.prompts.cut_lines import LineEnd, LineRest, line_end, line_rest, same_line, same_statement
from cachetune_rag.text.prompts.segments import Prompt
from cachetune_rag.text.prompts.sentence_ends import CLOSING, MARKS, OTHER_MARKS

MOST_TOKENS = 64
"""Most tokens of a continuation. A sentence that goes on for longer is a list, or no sentence."""
_TAIL = 128
"""Tokens at the end of a chunk that show whether it breaks off within a sentence."""
_HEAD = MOST_TOKENS + 8
"""Tokens at the beginning of a chunk that are looked at: some more than the longest continuation, because what follows shows where it ends."""
_OVERLAP = 16
"""Tokens at the beginning of a chunk that the end of the chunk before has, too, if both are windows that overlap."""
_NEAR = 16
"""Most tokens between two chunks that follow each other. A separator has one or two."""
_KNOWN = 2048
"""Beginnings and ends of chunks that are remembered: those of a few dozen long prompts."""

_STOP = rf"(?:[{MARKS}]|(?<!\b[^\W\d_])\.)"
"""A letter alone before a full stop is an initial, or part of an abbreviation."""
_BETWEEN = re.compile(rf"{_STOP}{CLOSING}\s+(?=[^\sa-z])|[{OTHER_MARKS}]{CLOSING}\s*|\n\s*\n")
"""Between two sentences, or two paragraphs."""
_SENTENCES = re.compile(rf"\w[.!?]{CLOSING} +[\"'(\[“‘«]*\w|[{OTHER_MARKS}]")
"""Where prose has ended a sentence. Titles, tables and code don't."""
_ROW = re.compile(r"^[^\S\n]*\|[^\n]*\Z", re.MULTILINE)
"""A last line that is a row of a table, or the beginning of one."""
_ROW_REST = re.compile(r"\A[^\S\n]*\S[^\n]*\|[^\S\n]*(?=\n|\Z)")
"""A first line that ends as a row does."""
_END = re.compile(rf"{_STOP}{CLOSING}(?=\s+[^\sa-z]|\s*\Z)|[{OTHER_MARKS}]{CLOSING}|\n\s*\n")
PART = "\ufffd"
"""What stands for a part of a character. It counts as a letter."""
_UNFINISHED = re.compile(rf"[\w,;，、；{PART}]\Z")


class Continuation(NamedTuple):
    """A sentence, a row of a table, or a line or statement of code that two chunks share. Both ranges are places in the prompt, and not empty.

    Attributes:
        begun: where it begins: the end of the first chunk, and what stands between both.
        rest: where it goes on: the first tokens of the second chunk, up to the sentence's end.
    """

    begun: range
    rest: range


FindContinuations = Callable[[Prompt], tuple[Continuation, ...]]
"""Finds those of a prompt, in its order."""


def no_continuations(prompt: Prompt) -> tuple[Continuation, ...]:
    """None: for prompts of token ids that spell no text."""
    return ()


class Continuations:
    """Finds continuations (`FindContinuations`). Safe to use from many threads.

    Args:
        tokenizer: the model's; nothing may change it.
    """

    def __init__(self, tokenizer: Any):
        self._pieces = Pieces(tokenizer)
        self._begun = lru_cache(_KNOWN)(self._count_begun)
        self._rest = lru_cache(_KNOWN)(self._count_rest)
        self._text = lru_cache(_KNOWN)(self._edged)

    def __call__(self, prompt: Prompt) -> tuple[Continuation, ...]:
        """Those of a prompt, in its order."""
        found = []
        spans = sorted((s for s in (*prompt.passed, *prompt.spans) if s.start < s.end), key=lambda s: s.start)
        for first, second in pairwise(spans):
            if second.start - first.end > _NEAR or second in prompt.passed:
                continue
            documents = {prompt.chunk_documents[first.chunk], prompt.chunk_documents[second.chunk]} - {None}
            if len(documents) > 1 or prompt.chunk_ids[first.chunk] == prompt.chunk_ids[second.chunk]:
                continue
            before, after = prompt.chunk_ids[first.chunk], prompt.chunk_ids[second.chunk]
            begun, rest = self._shared(before[-_TAIL:], after[:_HEAD])
            # Tokens at a chunk's edges may stand in the prompt in another form, outside of its span.
            start = max(first.start, first.start - first.first + len(before) - begun)
            end = min(second.end, second.start - second.first + rest)
            if begun and start < second.start < end and not self._overlap(before, after):
                found.append(Continuation(range(start, second.start), range(second.start, end)))
        return tuple(found)

    def _shared(self, tail: tuple[int, ...], head: tuple[int, ...]) -> tuple[int, int]:
        """How many of a chunk's last tokens begin what the first ones of the next chunk go on with, and how many these are; 0 and 0 if nothing goes on."""
        rest = self._rest(head)
        if not (rest.sentence or rest.row or rest.line):
            return 0, 0
        begun = self._begun(tail)
        # A line that begins with "|" is a row of its own behind one that ends so.
        if begun.row and rest.row and not (begun.closed and rest.opens):
            return begun.row, rest.row
        if begun.sentence and rest.sentence:
            return begun.sentence, rest.sentence
        return _line_shared(begun, rest)

    def _overlap(self, before: tuple[int, ...], after: tuple[int, ...]) -> bool:
        """Whether a chunk begins with the end of the one before, as windows do: then it has the cut sentence whole.

        What it begins with may stand elsewhere in the chunk before as well: above all a few words, where the chunk has no more.
        """
        end, whole, first = self._text(before), self._text(after), self._text(after[:_OVERLAP])
        place = end.find(first)
        while place >= 0:
            if whole.startswith(end[place:]):
                return True
            place = end.find(first, place + 1)
        return False

    def _edged(self, ids: tuple[int, ...]) -> str:
        """What tokens spell, without blanks and parts of characters at both ends: the text around may be cut there."""
        return self._spelled(ids)[0].strip(PART).strip()

    def _count_begun(self, tail: tuple[int, ...]) -> _Begun:
        """What a chunk's last tokens begin."""
        text, end = self._spelled(tail)

        @cache
        def since(place: int) -> int:
            return len(tail) - _tokens_to(place, len(tail), end)

        row, line, whole = _ROW.search(text), line_end(text), text.rstrip()
        return _Begun(
            self._sentence_begun(whole, len(tail), end),
            0 if row is None else since(row.start()),
            whole.endswith("|"),
            line,
            0 if line is None else since(line.start),
            0 if line is None else since(line.statement),
        )

    def _sentence_begun(self, text: str, tokens: int, end: Callable[[int], int]) -> int:
        """How many of a chunk's last tokens begin a sentence without ending it; 0 if it ends otherwise, or is no prose."""
        if not _UNFINISHED.search(text) or not _SENTENCES.search(text):
            return 0
        ends = [
            len(text[: between.end()].rstrip()) for between in _BETWEEN.finditer(text)
        ]  # a blank belongs to the next word's token
        return tokens - _tokens_to(ends[-1], tokens, end) if ends else 0

    def _count_rest(self, head: tuple[int, ...]) -> _Rest:
        """What a chunk's first tokens go on with."""
        text, end = self._spelled(head)

        @cache
        def until(place: int) -> int:
            return _tokens_to(place, len(head), end)

        row, line = _ROW_REST.search(text), line_rest(text)
        return _Rest(
            self._sentence_rest(text, len(head), end),
            0 if row is None else min(MOST_TOKENS, until(row.end())),
            text.lstrip().startswith("|"),
            line,
            0 if line is None else min(MOST_TOKENS, until(line.end)),
            0 if line is None else until(line.statement),
        )

    def _sentence_rest(self, text: str, tokens: int, end_of: Callable[[int], int]) -> int:
        """How many of a chunk's first tokens go on with a sentence; 0 if it begins with a sentence of its own, or with none.

        A capital letter begins a sentence. Where a script has none, only the chunk before shows whether one goes on.
        """
        first = text.lstrip()[:1]
        if not (first.isalnum() or first == PART) or first.isupper() or first.istitle():
            return 0
        end = _END.search(text, text.index(first))
        return min(MOST_TOKENS, tokens if end is None else _tokens_to(end.end(), tokens, end_of))

    def _spelled(self, ids: Sequence[int]) -> tuple[str, Callable[[int], int]]:
        """The text of some tokens, and what tells how many characters of it the first ones have."""
        pieces = self._pieces(ids)
        text = "".join(pieces)
        if PART not in text:
            return text, list(accumulate(map(len, pieces), initial=0)).__getitem__
        # Characters of several tokens: only all of them together spell them.
        return self._pieces.text(ids), cache(lambda count: len(self._pieces.text(ids[:count]).rstrip(PART)))


class _Begun(NamedTuple):
    """How many of a chunk's last tokens begin a sentence, or are its last row, as far as it stands there, each 0 if there is none; whether they end as a row does; and what
    they show of its last line, with how many of them are in this line, and in the statement that the line belongs to."""

    sentence: int
    row: int
    closed: bool
    line: LineEnd | None
    in_line: int
    in_statement: int


class _Rest(NamedTuple):
    """How many of a chunk's first tokens go on with a sentence, or end a row, each 0 if none do; whether they begin as a row does; and what they show of its first line, with
    how many of them are in this line, and in a statement that the chunk before began."""

    sentence: int
    row: int
    opens: bool
    line: LineRest | None
    in_line: int
    in_statement: int


def _line_shared(begun: _Begun, rest: _Rest) -> tuple[int, int]:
    """See `Continuations._shared`, for lines that are neither prose nor rows."""
    if begun.line is None or rest.line is None:
        return 0, 0
    if rest.in_statement <= MOST_TOKENS and same_statement(begun.line, rest.line):
        return begun.in_statement, rest.in_statement
    if not same_line(begun.line, rest.line):
        return 0, 0
    # A paragraph without line breaks is one line.
    return begun.in_line, min(rest.in_line, rest.sentence or rest.in_line)


class Pieces:
    """What tokens spell, one by one; it is remembered for each token of the vocabulary. Safe to use from many threads.

    Args:
        tokenizer: the model's; nothing may change it.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        # Decoders of some vocabularies drop the blank before the first word of a text, so every token is spelled behind another one.
        self._alone = list(tokenizer.encode("a", add_special_tokens=False))
        self._first = self._alone[-1:]
        self._before = len(self._decode(self._first))
        self._known: dict[int, str] = {}

    def __call__(self, ids: Sequence[int]) -> list[str]:
        """A piece for each token. A token that is a part of a character has `PART`."""
        known = self._known
        return [known[i] if i in known else self._spell(i) for i in ids]

    def text(self, ids: Sequence[int]) -> str:
        """What the tokens spell together."""
        return self._decode([*self._first, *ids])[self._before :]

    def ids(self, letter: str) -> list[int]:
        """The tokens of a letter that stands behind another one; none if the vocabulary can't spell it there."""
        whole: list[int] = self._tokenizer.encode(f"a{letter}", add_special_tokens=False)
        ids = whole[len(self._alone) :]
        return ids if self.text(ids) == letter else []

    def _spell(self, number: int) -> str:
        piece = self._known[number] = self.text([number])
        return piece

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text


def _tokens_to(place: int, count: int, end: Callable[[int], int]) -> int:
    """How many of `count` tokens it takes to spell the characters before `place`; see `Continuations._spelled`."""
    return bisect_left(range(1, count + 1), place, key=end) + 1 if place else 0
