"""Web pages: the text of a page as Markdown, without scripts and styles, read by Beautiful Soup and markdownify."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from cachetune_rag.checking.escaping import visible_line
from cachetune_rag.text.files.readers.base import CorpusError, Reader, SourceDocument, clean, read_whole

_NOT_SAID = ["head", "script", "style", "template", "noscript", "svg", "iframe", "object", "canvas"]


class HtmlReader(Reader):
    """A file is a document. It is read in the encoding that it states. Of links and pictures, only the words stay."""

    what = "HTML"
    suffixes = (".html", ".htm", ".xhtml")
    packages = ("bs4", "markdownify")

    def check(self, head: bytes, path: Path) -> None:
        """Refuse files that begin like other formats. Zero bytes are allowed, because a page may be in any encoding."""
        if head.startswith((b"%PDF-", b"PK\x03\x04", b"\x1f\x8b", b"\x89PNG")):
            raise CorpusError(f"{visible_line(path)} is a binary file, not HTML: give it the ending of what it is.")

    def read(self, stream: BinaryIO, name: str, path: Path) -> Iterator[SourceDocument]:
        """One document."""
        data = read_whole(stream, path)
        try:
            text = clean(_markdown(data))
        except (RecursionError, ValueError, AssertionError) as error:
            raise CorpusError(
                f"{visible_line(path)} can't be read as HTML ({type(error).__name__}: {error}): repair it, or convert it to text."
            ) from None
        yield SourceDocument(name, text, None, len(data), str(path))


def _markdown(data: bytes) -> str:
    from bs4 import BeautifulSoup, Tag
    from markdownify import MarkdownConverter

    class Page(BeautifulSoup):
        """A page. Markdownify converts a tag inside of its parent's conversion, so a page that is nested deeper than Python's calls is refused.

        That is done while the page is read, because to read such tags takes time that grows with the square of their number.
        """

        def pushTag(self, tag: Tag) -> None:
            if len(self.tagStack) > sys.getrecursionlimit():
                raise RecursionError(f"its tags are nested more than {sys.getrecursionlimit()} deep")
            super().pushTag(tag)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are advice to programmers, for example that the page looks like XML
        page = Page(data, "html.parser")
    title = page.title.get_text(" ", strip=True) if page.title else ""
    for tag in page.find_all(_NOT_SAID):
        tag.decompose()
    convert = MarkdownConverter(
        heading_style="atx", bullets="-", strip=["a", "img"], escape_asterisks=False, escape_underscores=False, escape_misc=False
    )  # fmt: skip
    heading = f"# {title}\n\n" if title and page.h1 is None else ""
    body = re.sub(r"[ \t]+\n", "\n", convert.convert_soup(page)).strip()
    return re.sub(r"\n{3,}", "\n\n", f"{heading}{body}\n") if heading or body else ""
