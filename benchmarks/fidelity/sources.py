"""Real documents that are on the machine, by source, the same on every run."""

from __future__ import annotations

import ast
import gzip
import importlib.metadata
import pydoc_data.topics
import re
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import ClassVar, NamedTuple

SUFFIXES = {".html", ".htm", ".txt", ".md", ".rst"}
_LARGEST = 2 << 20


class Text(NamedTuple):
    """A document: its name in the source, and its text."""

    name: str
    text: str


def installed_sources() -> dict[str, Iterator[Text]]:
    """Documents that come with Python and its packages: the language reference, docstrings of the library, READMEs."""
    return {"reference": _topics(), "docstrings": _docstrings(), "readmes": _readmes()}


def folder_sources(folders: Sequence[Path]) -> Mapping[str, Iterator[Text]]:
    """One source for each folder of pages (HTML, text, Markdown, reStructuredText; also gzipped). It has the folder's name.

    Raises:
        ValueError: a path is no folder, or two folders have the same name.
    """
    sources: dict[str, Iterator[Text]] = {}
    for folder in folders:
        name = folder.resolve().name
        if not folder.is_dir():
            raise ValueError(f"{folder} is no folder: give folders of pages, such as those under /usr/share/doc.")
        if name in sources:
            raise ValueError(f"two folders are called {name!r}: rename one, sources go by the folder's name.")
        sources[name] = _pages(folder)
    return sources


def _topics() -> Iterator[Text]:
    for name in sorted(pydoc_data.topics.topics):
        yield Text(name, pydoc_data.topics.topics[name])


def _docstrings() -> Iterator[Text]:
    """One document for each module of the standard library: its docstrings in order. Nothing is imported."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.glob("*.py")) + sorted(library.glob("[a-z]*/*.py")):
        if path.parent.name in {"test", "tests", "idlelib", "site-packages", "dist-packages"}:
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (OSError, SyntaxError, ValueError):
            continue
        nodes = [n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
        nodes.sort(key=lambda n: getattr(n, "lineno", 0))
        docs = [doc for n in nodes if (doc := ast.get_docstring(n))]
        yield Text(path.relative_to(library).as_posix(), "\n\n".join(docs))


def _readmes() -> Iterator[Text]:
    found = {d.name: d.metadata for d in importlib.metadata.distributions() if d.metadata is not None}
    for name in sorted(found, key=str.lower):
        body = found[name].get_payload()  # the long description, as PyPI shows it
        yield Text(name, body if isinstance(body, str) else "")


def _pages(folder: Path) -> Iterator[Text]:
    for path in sorted(folder.rglob("*"), key=lambda p: p.as_posix()):
        zipped = path.suffix == ".gz"
        kind = Path(path.stem).suffix if zipped else path.suffix
        if kind not in SUFFIXES or not path.is_file() or path.stat().st_size > _LARGEST:
            continue
        try:
            raw = gzip.decompress(path.read_bytes()) if zipped else path.read_bytes()
        except (OSError, EOFError):
            continue
        text = raw.decode("utf-8", errors="ignore").replace("\r\n", "\n")
        yield Text(path.relative_to(folder).as_posix(), html_text(text) if kind in {".html", ".htm"} else text)


def html_text(page: str) -> str:
    """The text of a page, without navigation."""
    parser = _Words()
    parser.feed(page)
    parser.close()
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+\n", "\n", "".join(parser.words))).strip()


class _Words(HTMLParser):
    _HIDDEN: ClassVar = {"head", "script", "style", "nav", "footer"}
    _LINES: ClassVar = {"p", "li", "dt", "dd", "pre", "tr", "div", "br", "h1", "h2", "h3", "h4", "h5", "h6", "table"}

    def __init__(self) -> None:
        super().__init__()
        self.words: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._hidden += tag in self._HIDDEN
        if tag == "br":
            self.words.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in self._HIDDEN:
            self._hidden = max(0, self._hidden - 1)
        elif tag in self._LINES:
            self.words.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.words.append(data)
