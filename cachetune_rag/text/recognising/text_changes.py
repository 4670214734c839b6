"""Says how a prompt changed a stored text, so that an exact search doesn't find it. Needs only the two texts, and is cheap.

Each kind of change is tried by itself: it is undone, and the text is looked for again. If none fits, the letters alone are compared.
"""

from __future__ import annotations

import html
import json
import re
import unicodedata
from collections.abc import Iterable

from cachetune_rag.text.recognising.chunk_recognizer import ANCHOR

REASONS = {
    "stripped": "the stored texts have blanks or line ends at their ends that the prompt leaves out",
    "escaped": "the prompt shows the stored texts escaped, as HTML, JSON or a Python repr",
    "quoted": "the prompt puts a mark such as '> ' before each line of the stored texts",
    "numbered": "the prompt puts a number before each line of the stored texts",
    "indented": "the prompt indents the lines of the stored texts",
    "whitespace": "blanks or line ends inside the stored texts are other ones in the prompt",
    "unicode": "characters of the stored texts are spelt in another way in the prompt, by Unicode normalisation or other quotation marks",
    "case": "the prompt shows the stored texts in other upper and lower case",
    "header": "the texts are stored with lines of metadata before them that the prompt doesn't show",
    "truncated": "the prompt shows only a part of the stored texts",
    "short": f"the stored texts are shorter than {ANCHOR} characters, which is too short to be looked for",
    "altered": "texts much like those in the prompt are stored, and differ in several ways",
    "not shown": "the retrieved texts are stored, but don't stand in the prompt",
    "not stored": "no text like it was found in the store",
}
"""By kind of change, what happened."""

MOST = 100_000
"""Characters of a prompt that are looked at."""

_PIECE, _PIECES = 24, 6
_LETTERS = re.compile(r"[\W\d_]+")
_HEADER_PARTS = 8  # paragraphs
_HEADER_LINE = re.compile(r"\s*[\w .\-]{1,40}:(\s|$)")
_LINE_MARK = re.compile(r"^[ \t]*(?:[>|*#-]+|[(\[]?\d+[.:)\]]*)?[ \t]*", re.MULTILINE)
_JSON_ESCAPE = re.compile(r'\\(?:u([0-9a-fA-F]{4})|([nrtbf"\'\\/]))')
_JSON_CHARACTERS = {"n": "\n", "r": "\r", "t": "\t", "b": "\b", "f": "\f"}
_QUOTES = str.maketrans({"“": '"', "”": '"', "„": '"', "‘": "'", "’": "'", "–": "-", "—": "-", "…": "..."})


def change_of(stored: str, shown: str) -> str | None:
    """The kind of change that keeps `stored` from being found in `shown`: a key of `REASONS`, or None if it isn't there at all."""
    shown, body = shown[:MOST], stored.strip()
    if not body:
        return None
    if len(stored) < ANCHOR:
        return "short" if body in shown else None
    if body in shown:
        return "stripped"
    if any(form in shown for form in _escaped(body)):
        return "escaped"
    if kind := _changed_lines(body, shown):
        return kind
    if _squeezed(body) in _squeezed(shown):
        return "whitespace"
    if _squeezed(_plain(body)) in _squeezed(_plain(shown)):
        return "unicode"
    if _squeezed(_plain(body).casefold()) in _squeezed(_plain(shown).casefold()):
        return "case"
    return _part(body, shown) or ("altered" if likeness(stored, pieces_of(shown)) >= 0.5 else None)


def pieces_of(shown: str) -> frozenset[str]:
    """All stretches of letters of a prompt. By them, similar texts are found even if blanks, case and punctuation were changed."""
    letters = _letters(_unescaped(shown[:MOST]))
    return frozenset(letters[i : i + _PIECE] for i in range(len(letters) - _PIECE + 1))


def likeness(stored: str, pieces: frozenset[str]) -> float:
    """Share of a few stretches of a text that are among those of a prompt."""
    step = max(1, (len(stored) - 3 * _PIECE) // (_PIECES - 1))
    cuts = dict.fromkeys(
        _letters(stored[at : at + 3 * _PIECE])[:_PIECE] for at in range(0, max(1, len(stored) - _PIECE), step)
    )
    probes = [cut for cut in cuts if len(cut) == _PIECE]
    return sum(probe in pieces for probe in probes) / len(probes) if probes else 0.0


def _escaped(body: str) -> Iterable[str]:
    yield html.escape(body)
    yield html.escape(body, quote=False)
    yield html.escape(body).replace("&#x27;", "&#39;")  # as Jinja writes it
    yield json.dumps(body)[1:-1]
    yield json.dumps(body, ensure_ascii=False)[1:-1]
    yield repr(body)[1:-1]


def _changed_lines(body: str, shown: str) -> str | None:
    """The kind of change, if the prompt differs only in what stands before each line; None otherwise."""
    bare = _LINE_MARK.sub("", body)
    lines = [line for line in bare.splitlines() if line.strip()]
    if len(lines) < 2 or bare not in _LINE_MARK.sub("", shown):
        return None
    last = lines[-1]
    marks = [line[: line.index(last)] for line in shown.splitlines() if last in line]
    mark = next((mark for mark in marks if mark.strip()), marks[0] if marks else "")
    if any(character.isdigit() for character in mark):
        return "numbered"
    return "quoted" if mark.strip() else "indented" if mark else "whitespace"


def _part(body: str, shown: str) -> str | None:
    """The kind of change, if only a part of the text is there unchanged: all but its first lines of metadata, or some other part."""
    head, _, rest = body.partition("\n\n")
    for _ in range(_HEADER_PARTS):
        if not rest or not all(_HEADER_LINE.match(line) for line in head.splitlines() if line.strip()):
            break
        if len(rest.strip()) >= ANCHOR and rest.strip() in shown:
            return "header"
        more, _, rest = rest.partition("\n\n")
        head = f"{head}\n{more}"
    lines = body.splitlines()
    for number in range(1, min(len(lines), 12)):
        if not _HEADER_LINE.match(lines[number - 1]):
            break
        rest = "\n".join(lines[number:]).strip()
        if len(rest) >= ANCHOR and rest in shown:
            return "header"
    size = max(ANCHOR, min(2 * ANCHOR, len(body) // 4))
    places = range(0, max(1, len(body) - size + 1), max(1, (len(body) - size) // 8 or 1))
    return "truncated" if any(body[at : at + size] in shown for at in places) else None


def _squeezed(text: str) -> str:
    return " ".join(text.split())


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text).translate(_QUOTES)


def _letters(text: str) -> str:
    return _LETTERS.sub("", unicodedata.normalize("NFKC", text).casefold())


def _unescaped(text: str) -> str:
    return _JSON_ESCAPE.sub(_character, html.unescape(text))


def _character(match: re.Match[str]) -> str:
    code, letter = match.groups()
    return chr(int(code, 16)) if code else _JSON_CHARACTERS.get(letter, letter)
