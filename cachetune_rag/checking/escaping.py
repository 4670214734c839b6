"""Text from outside (ids, file names, a model's answer), made harmless for a terminal.

An escape sequence in a document's id can clear the screen, forge lines, or type into some terminals; a bidirectional
override shows a name in another order. Such characters are written as escapes, as in Python.
"""

from __future__ import annotations

import re

_HARMFUL = re.compile(
    "["
    "\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 and C1 controls and DEL; tab and line feed are handled apart
    "\u2028\u2029"  # line ends that not every program takes for one
    "\u202a-\u202e\u2066-\u2069"  # bidirectional embeddings, overrides and isolates
    "\ufff9-\ufffb\U000e0000-\U000e007f"  # annotations and tags: text that nobody sees
    "\ud800-\udfff"  # halves of surrogate pairs: bytes of a file name that are no text
    "]"
)
_LINE = re.compile(f"[\t\n]|{_HARMFUL.pattern}")


def visible(text: str) -> str:
    """The text with every harmful character written as an escape, such as \\x1b. Line ends and tabs stay."""
    return _HARMFUL.sub(_spelt, text)


def visible_line(value: object) -> str:
    """An id, name or path as one line. Line ends and tabs are also written as escapes."""
    return _LINE.sub(_spelt, str(value))


def words_of(error: BaseException, most: int = 1000) -> str:
    """The message of another library's error, made harmless, with at most `most` characters; its type if it has no message."""
    text = visible(str(error).strip()) or type(error).__name__
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _spelt(match: re.Match[str]) -> str:
    character = match[0]
    if "\udc80" <= character <= "\udcff":  # how Python hands over a byte that is not UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")
