"""Readers of the kinds of files that hold documents, each in a file. For a new kind, add a file here and a name to `READERS`."""

from __future__ import annotations

from pathlib import PurePath

from cachetune_rag.text.files.readers.base import CorpusError, Reader, SourceDocument
from cachetune_rag.text.files.readers.json_lines import JsonLinesReader
from cachetune_rag.text.files.readers.pages_html import HtmlReader
from cachetune_rag.text.files.readers.pages_pdf import PdfReader
from cachetune_rag.text.files.readers.plain import PlainReader
from cachetune_rag.text.files.readers.tables import TableReader

__all__ = ["PLAIN", "READERS", "SUFFIXES", "CorpusError", "Reader", "SourceDocument", "reader_for"]

PLAIN = PlainReader()
READERS: tuple[Reader, ...] = (PLAIN, JsonLinesReader(), TableReader(), HtmlReader(), PdfReader())
SUFFIXES: tuple[str, ...] = tuple(suffix for reader in READERS for suffix in reader.suffixes)

_BY_SUFFIX = {suffix: reader for reader in READERS for suffix in reader.suffixes}


def reader_for(path: PurePath) -> Reader | None:
    """The reader of files with this ending; None if there is none."""
    return _BY_SUFFIX.get(path.suffix.lower())
