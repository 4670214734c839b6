"""Documents that are no prose in English: code, tables, and text files of any language."""

from __future__ import annotations

import re
import sys
import sysconfig
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from .documents import SKIPPED, Shape
from .sources import Text

ROWS = 400
"""Of a table."""
_LEFT_OUT = {"test", "tests", "idlelib", "site-packages", "dist-packages", "encodings", "pydoc_data"}
"""Folders: tests, packages, and those whose files are data."""
_FUNCTION = re.compile(r"^[ \t]*(?:async )?def (\w+)\(([^()]*)\)", re.MULTILINE)
_MANY_ALIKE = ("CJK ", "HANGUL SYLLABLE", "TANGUT", "KHITAN", "NUSHU CHARACTER")


def code_sources() -> dict[str, Iterator[Text]]:
    """The sources of Python's standard library, with comments and docstrings."""
    return {"library": (Text(name, text) for name, text in _modules())}


def table_sources() -> dict[str, Iterator[Text]]:
    """Tables of what comes with Python: the functions of its standard library, and the characters of Unicode."""
    return {"functions": _tables("functions", _functions()), "characters": _tables("characters", _characters())}


CONTENTS: dict[str, Callable[[], Mapping[str, Iterator[Text]]]] = {"code": code_sources, "tables": table_sources}
"""Documents by what they are, where that isn't prose."""


def prose_source(path: Path, count: Callable[[str], int], shape: Shape) -> Mapping[str, Iterable[Text]]:
    """A file of prose as one source of documents, which has the file's name. It is cut between paragraphs where two records are full.

    Args:
        path: a text file, in which words have spaces between them.
        count: gives the number of tokens of a text.
        shape: of the records.
    """
    least = 2 * shape.tokens + SKIPPED + 64
    parts: list[str] = []
    texts: list[Text] = []
    tokens = 0
    whole = path.read_text(encoding="utf-8")
    blank = re.compile(r"\n\s*\n")
    for paragraph in blank.split(whole) if blank.search(whole) else whole.splitlines():
        parts.append(paragraph.strip())
        tokens += count(parts[-1])
        text = "\n\n".join(parts)
        if tokens >= least and len(text) > least:
            texts.append(Text(f"{len(texts) + 1}", text))
            parts, tokens = [], 0
    return {path.stem: texts}


def _modules() -> Iterator[tuple[str, str]]:
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.glob("*.py")) + sorted(library.glob("[a-z]*/*.py")):
        if path.parent.name not in _LEFT_OUT:
            try:
                yield path.relative_to(library).as_posix(), path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue


def _functions() -> Iterator[Sequence[str]]:
    for name, text in _modules():
        for found in _FUNCTION.finditer(text):
            line = text.count("\n", 0, found.start(1)) + 1
            yield name.removesuffix(".py"), found[1], " ".join(found[2].replace("|", "or").split()), str(line)


def _characters() -> Iterator[Sequence[str]]:
    for code in range(0x21, sys.maxunicode + 1):
        name = unicodedata.name(chr(code), "")
        if name and not name.startswith(_MANY_ALIKE):
            character = chr(code)
            parts = unicodedata.decomposition(character) or "-"
            yield f"U+{code:04X}", name, unicodedata.category(character), unicodedata.bidirectional(character), parts


def _tables(name: str, rows: Iterable[Sequence[str]]) -> Iterator[Text]:
    lines: list[str] = []
    number = 0
    for row in rows:
        lines.append(f"| {' | '.join(row)} |")
        if len(lines) == ROWS:
            number += 1
            yield Text(f"{name}-{number}", "\n".join(lines))
            lines = []
