"""Plain text and Markdown: a file is a document, of which every character is kept."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from cachetune_rag.checking.escaping import visible_line
from cachetune_rag.text.files.readers.base import CorpusError, Reader, SourceDocument, read_whole

BOM = b"\xef\xbb\xbf"
_PACKED = (b"PK\x03\x04", b"\x1f\x8b", b"\xd0\xcf\x11\xe0")


class PlainReader(Reader):
    """Also reads files with any other ending, if they are given themselves."""

    what = "text"
    suffixes = (".txt", ".md", ".markdown", ".rst")

    def check(self, head: bytes, path: Path) -> None:
        """Refuse what is clearly no text."""
        refuse_binary(head, path)

    def read(self, stream: BinaryIO, name: str, path: Path) -> Iterator[SourceDocument]:
        """One document."""
        data = read_whole(stream, path)
        yield SourceDocument(name, decode(data, path), None, len(data), str(path))


def refuse_binary(head: bytes, path: Path) -> None:
    """Refuse a file that is not UTF-8 text, by its first bytes.

    Raises:
        CorpusError: says what it is and what to do.
    """
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise CorpusError(f"{visible_line(path)} is UTF-16, not UTF-8: convert it, e.g. with iconv -f UTF-16 -t UTF-8.")
    if head.startswith(b"%PDF-"):
        raise CorpusError(
            f"{visible_line(path)} is a binary file: a PDF, which is read if its name ends in .pdf. Rename it."
        )
    if head.startswith(_PACKED) or b"\0" in head:
        raise CorpusError(
            f"{visible_line(path)} is a binary file: only text can be indexed (plain text, Markdown, JSONL, CSV, HTML, and the "
            "text of PDFs). Convert it first."
        )


def decode(data: bytes, path: Path) -> str:
    """The text exactly as in the file, with its line ends. Only a byte order mark is removed.

    Raises:
        CorpusError: it is not UTF-8, or binary.
    """
    try:
        text = data.removeprefix(BOM).decode()
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise CorpusError(not_utf8(f"{visible_line(path)}:{line}", error)) from None
    if "\0" in text:
        raise CorpusError(
            f"{visible_line(path)} holds NUL bytes, so it is a binary file: only text can be indexed. Convert it first."
        )
    return text


def not_utf8(where: str, error: UnicodeDecodeError) -> str:
    """The message about bytes that are not UTF-8."""
    byte = error.object[error.start]
    return f"{where} is not UTF-8 (byte 0x{byte:02x}): convert it, e.g. with iconv -f LATIN1 -t UTF-8."
