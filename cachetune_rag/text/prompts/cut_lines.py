"""Whether the end of one text and the beginning of the next are two parts of one line: of code, of a list of settings, of a comment.

Such lines have no sentences. What they have in common, in whichever language, is told instead: brackets and quotes that are open, operators that want something on their
other side, a blank where lines have none, and ends of lines that no other line has. Where nothing of this is seen, the line is taken to be whole, since most texts of code are cut
between lines.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from cachetune_rag.text.prompts.sentence_ends import CLOSING, MARKS, OTHER_MARKS

_PAIRS = {")": "(", "]": "[", "}": "{"}
_BRACKET = re.compile(r"[()\[\]{}]")
_QUOTES = "\"'`"
_WITHIN_A_WORD = re.compile(r"\w'\w")
"""An apostrophe, which is no quote."""
_WANTS_MORE = re.compile(r"(?:[=+<\\]|&&|\|\||[\"']:)\Z")
"""A line that ends so has its other part elsewhere, but for one of such marks alone."""
_LETTER = re.compile(r"\w")
_BEGINS_WITHIN = re.compile(r",|=(?=[\s\"'(\[])|[=!<>+*/-]=\s|&&\s|<\s|\|\|\s(?!.*\|\s*\Z)")
"""No line begins so."""
_BLANK = re.compile(r" [^\s*]")
"""One blank at the beginning, but not of a comment's line that begins with " *"."""
_BLANK_AT_END = re.compile(r"\S \Z")
_STOPPED = re.compile(rf"[{MARKS}.;{OTHER_MARKS}]{CLOSING}\Z")
_SENTENCE_ENDS = re.compile(rf"\w[{MARKS}.]{CLOSING}(?:\s+[\"'(\[“‘«]*\w|\s*\Z)")
"""Where words in a line end a sentence."""
_NUMBERED = re.compile(r"\d{1,2}[.)]\s")
"""The beginning of an item of a list."""
_COMMENT = re.compile(r"(?:#+|//+|--+|;+|%+)(?=\s)")
"""Marks of comments, which begin each line of one that goes over several."""
_LINES = 4
"""From so many other lines on, it says something that none of them ends as a line does."""
_WORD = "w"


class LineEnd(NamedTuple):
    """What the end of a text shows of its last line. Places are those of characters in the text.

    Attributes:
        start: where the line begins.
        statement: where the line begins in which the last "(" or "[" stands that isn't closed; `start` if there is none.
        opened: that bracket, or "".
        opened_in_line: the last bracket of the line itself that isn't closed there, or "". A "{" at its end opens a block, not a line's part.
        quotes: the quotes of which it has an odd number.
        wants_more: whether it ends in an operator, or in a blank.
        stopped: whether it ends as a sentence or a statement does.
        comment: the mark of a comment that it begins with, or "".
        kind: its last letter, or `_WORD` for those of words.
        kinds: the same of the other lines.
    """

    start: int
    statement: int
    opened: str
    opened_in_line: str
    quotes: frozenset[str]
    wants_more: bool
    stopped: bool
    comment: str
    kind: str
    kinds: tuple[str, ...]


class LineRest(NamedTuple):
    """What the beginning of a text shows of its first line.

    Attributes:
        end: where the line ends.
        statement: where the line ends that closes a bracket of before the text; 0 if there is none.
        closed: that bracket, as it was opened, or "".
        closed_in_line: the same of the first line alone.
        quotes: see `LineEnd`.
        goes_on: whether it begins as no line does.
        blank: whether it begins with one blank. Lines have none, or several.
        sentence: whether it begins with a small letter or a number, and words in it end a sentence.
        comment, kinds: see `LineEnd`. What is said of the line is said of what stands behind the mark.
    """

    end: int
    statement: int
    closed: str
    closed_in_line: str
    quotes: frozenset[str]
    goes_on: bool
    blank: bool
    sentence: bool
    comment: str
    kinds: tuple[str, ...]


def line_end(text: str) -> LineEnd | None:
    """The last line of a text; None if the text ends with a whole one."""
    start = text.rfind("\n") + 1
    line = text[start:].strip()
    if not line:
        return None
    opened, _ = _open_brackets(text)
    opened_in_line, _ = _open_brackets(line)
    bracket, place = opened[-1] if opened else ("", start)
    if bracket == "{":  # of a block
        bracket, place = "", start
    inner = "" if not opened_in_line or line.endswith("{") else opened_in_line[-1][0]
    row = line.startswith("|")
    return LineEnd(
        start,
        text.rfind("\n", 0, place) + 1 if bracket else start,
        bracket,
        inner,
        _odd_quotes(line),
        (not row and bool(_WANTS_MORE.search(line) and _LETTER.search(line))) or bool(_BLANK_AT_END.search(text)),
        bool(_STOPPED.search(line)),
        _mark(line),
        _kind(line),
        _kinds(text),
    )


def line_rest(text: str) -> LineRest | None:
    """The first line of a text; None if the text begins with a line break."""
    end = _end_of_line(text, 0)
    line = text[:end].strip()
    if not line:
        return None
    _, closed = _open_brackets(text)
    _, closed_in_line = _open_brackets(line)
    statement = _end_of_line(text, closed[0][1]) if closed else 0
    comment = _mark(line)
    said = line[len(comment) :].strip()
    small = said[:1].isalnum() and not said[:1].isupper() and not _NUMBERED.match(said)
    return LineRest(
        end,
        statement,
        closed[0][0] if closed else "",
        closed_in_line[0][0] if closed_in_line else "",
        _odd_quotes(line),
        bool(_BEGINS_WITHIN.match(line)),
        bool(_BLANK.match(text)),
        bool(small and _SENTENCE_ENDS.search(said)),
        comment,
        _kinds(text),
    )


def same_statement(before: LineEnd, behind: LineRest) -> bool:
    """Whether a statement goes on from one text to the next: the first opens a bracket that the second closes."""
    return before.opened != "" and before.opened == behind.closed


def same_line(before: LineEnd, behind: LineRest) -> bool:
    """Whether a line goes on from one text to the next."""
    if before.wants_more or behind.goes_on or (behind.blank and not before.stopped):
        return True
    if before.opened_in_line != "" and before.opened_in_line == behind.closed_in_line:
        return True
    if not before.quotes.isdisjoint(behind.quotes):
        return True
    if before.kind not in (_WORD, ","):
        return False
    others = (*before.kinds, *behind.kinds)
    odd = len(others) >= _LINES and before.kind not in others
    return odd or (behind.sentence and behind.comment in ("", before.comment))


def _open_brackets(text: str) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """The brackets of a text that it opens and doesn't close, and those that it closes without having opened them (as they are opened), with their places."""
    opened: list[tuple[str, int]] = []
    closed: list[tuple[str, int]] = []
    for found in _BRACKET.finditer(text):
        bracket, place = found.group(), found.start()
        if bracket not in _PAIRS:
            opened.append((bracket, place))
        elif opened and opened[-1][0] == _PAIRS[bracket]:
            opened.pop()
        elif not opened:
            closed.append((_PAIRS[bracket], place))
    return opened, closed


def _end_of_line(text: str, place: int) -> int:
    """Where the line ends that a place stands in."""
    end = text.find("\n", place)
    return len(text) if end < 0 else end


def _odd_quotes(line: str) -> frozenset[str]:
    bare = _WITHIN_A_WORD.sub("", line)
    return frozenset(quote for quote in _QUOTES if bare.count(quote) % 2)


def _mark(line: str) -> str:
    found = _COMMENT.match(line)
    return found.group() if found else ""


def _kind(line: str) -> str:
    return _WORD if line[-1].isalnum() or line[-1] == "_" else line[-1]


def _kinds(text: str) -> tuple[str, ...]:
    """The kinds of all whole lines of a text but the first and the last one, each once for every line."""
    return tuple(_kind(line.rstrip()) for line in text.split("\n")[1:-1] if line.strip())
