"""Kinds of files that documents are read from, one file each. A new kind is a file here and a name in `READERS`."""

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
    """Who reads files with this ending; None: nobody."""
    return _BY_SUFFIX.get(path.suffix.lower())
