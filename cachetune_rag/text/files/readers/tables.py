"""Tables (CSV and TSV): a file is a document, and each row is a passage with a line `column: value` for each cell."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from cachetune_rag.checking.escaping import visible_line
from cachetune_rag.text.files.readers.base import MOST_BYTES, CorpusError, Reader, SourceDocument, read_whole
from cachetune_rag.text.files.readers.plain import decode, refuse_binary

_DELIMITERS = ",;\t|"


class TableReader(Reader):
    """The first row names the columns. The delimiter is a comma, semicolon, tab or bar: the one that gives that row the most columns."""

    what = "CSV"
    suffixes = (".csv", ".tsv")

    def check(self, head: bytes, path: Path) -> None:
        """Refuse what is clearly no text."""
        refuse_binary(head, path)

    def read(self, stream: BinaryIO, name: str, path: Path) -> Iterator[SourceDocument]:
        """One document. A row is not divided between chunks unless it is too long. Empty cells and rows are left out."""
        data = read_whole(stream, path)
        text = decode(data, path)
        # csv limits a cell to 128 KiB. The limit belongs to the whole process, so it is only ever raised.
        csv.field_size_limit(max(csv.field_size_limit(), MOST_BYTES))
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(text))
        try:
            header = next(rows, [])
            passages = tuple(filter(None, (_passage(header, row) for row in rows)))
        except csv.Error as error:
            raise CorpusError(
                f"{visible_line(path)}:{rows.line_num} is no row of a table ({error}): correct the line, or give the file "
                "another ending to have it read as text."
            ) from None
        yield SourceDocument(name, None, None, len(data), str(path), passages=passages)


def _delimiter(text: str) -> str:
    def columns(delimiter: str) -> int:
        try:
            return len(next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), []))
        except csv.Error:
            return 0

    return max(_DELIMITERS, key=columns)


def _passage(header: list[str], row: list[str]) -> str:
    names = [*(column.strip() for column in header), *[""] * (len(row) - len(header))]
    cells = [(name, cell.strip()) for name, cell in zip(names, row, strict=False) if cell.strip()]
    return "".join(f"{name}: {cell}\n" if name else f"{cell}\n" for name, cell in cells)
