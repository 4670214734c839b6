"""The text of PDFs, read by pypdf."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from cachetune_rag.checking.escaping import visible_line
from cachetune_rag.text.files.readers.base import CorpusError, Reader, SourceDocument, clean

_MARK_WITHIN = 1024
"""A PDF may begin with up to so many bytes of something else."""


_END = re.compile(rb"[\r\n]%%EOF")
_CUT_END = (b"%", b"%%E", b"%%EO")
"""How the last line of a file may end, of which pypdf takes the rest to be cut off."""
_BLOCK = 1 << 20


class PdfReader(Reader):
    """A file is a document. Its pages are joined by empty lines. Scanned pages have no text."""

    what = "PDF"
    suffixes = (".pdf",)
    packages = ("pypdf",)
    whole = False

    def check(self, head: bytes, path: Path) -> None:
        """Refuse a file without the mark of a PDF."""
        if b"%PDF-" not in head[:_MARK_WITHIN]:
            raise CorpusError(f"{visible_line(path)} is no PDF, although it is named like one: give it another ending.")

    def read(self, stream: BinaryIO, name: str, path: Path) -> Iterator[SourceDocument]:
        """One document."""
        try:
            text = clean(_text(stream, path))
        except (CorpusError, OSError, MemoryError):
            raise
        except Exception as error:  # pypdf may raise any error at a broken file
            raise CorpusError(
                f"{visible_line(path)} can't be read as a PDF ({type(error).__name__}: {error}): save it anew, or convert it to "
                "text."
            ) from None
        if not text.strip():
            raise CorpusError(
                f"{visible_line(path)} holds no text (its pages may be pictures): run text recognition (OCR) over it first."
            )
        yield SourceDocument(name, text, None, path.stat().st_size, str(path))


def _text(stream: BinaryIO, path: Path) -> str:
    import pypdf

    logging.getLogger("pypdf").setLevel(logging.ERROR)  # it would log a line for each flaw that it ignores
    if not _has_end(stream):
        raise CorpusError(
            f"{visible_line(path)} has no end mark (%%EOF), so a part of it is missing: save it or fetch it anew."
        )
    document = pypdf.PdfReader(stream)
    if document.is_encrypted and not document.decrypt(""):
        raise CorpusError(f"{visible_line(path)} is encrypted: save it without a password.")
    pages = (page.extract_text().strip() for page in document.pages)
    return "\n\n".join(filter(None, pages)) + "\n"


def _has_end(stream: BinaryIO) -> bool:
    """Whether a file has an end mark, usually in its last bytes. Without one, pypdf can't read it, and takes 0.2 s a MiB to say so."""
    last = position = stream.seek(0, os.SEEK_END)
    behind, found = b"", False
    while position and not found:
        begin = max(0, position - _BLOCK)
        stream.seek(begin)
        data = stream.read(position - begin) + behind
        found = _END.search(data) is not None or (position == last and data.rstrip().endswith(_CUT_END))
        behind, position = data[: len("\n%%EO")], begin
    stream.seek(0)
    return found
