"""Documents as rows of a Ray Data dataset."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow

from cachetune_rag.errors import ConfigError
from cachetune_rag.text.files.readers import SourceDocument
from cachetune_ray import failures
from cachetune_store.printing import shown

SCHEMA = pyarrow.schema(
    [
        ("id", pyarrow.string()),
        ("text", pyarrow.string()),
        ("chunks", pyarrow.list_(pyarrow.string())),
        ("passages", pyarrow.list_(pyarrow.string())),
        ("size", pyarrow.int64()),
        ("failed", pyarrow.string()),
        ("error", failures.TYPE),
    ]
)
"""Rows of `read_corpus`. `size` is what a document takes of its file, in bytes. A row with `failed` is no document, but a file, named by
`id`, that can't be read, and the reason. One with `error` ends the job."""


@dataclass(frozen=True)
class Columns:
    """Which columns of a dataset have the documents' ids, and their texts or their chunks.

    Attributes:
        id: a string, or a whole number.
        text: whole texts, which are split.
        chunks: lists of strings, which are kept as they are.
    """

    id: str = "id"
    text: str = "text"
    chunks: str = "chunks"

    def check(self, names: Iterable[str]) -> None:
        """Refuse a dataset without these columns.

        Raises:
            ConfigError: names the columns that it has.
        """
        known = list(names)
        if self.id in known and (self.text in known or self.chunks in known):
            return
        raise ConfigError(
            f"the dataset has the columns {', '.join(map(shown, known))}: it needs {shown(self.id)} (a document's id) and {shown(self.text)} "
            f"(its text) or {shown(self.chunks)} (a list of its passages). Rename them, or say id_column=, text_column=, chunks_column=."
        )

    def document(self, row: Mapping[str, Any]) -> SourceDocument:
        """The document in a row.

        Raises:
            ConfigError: the row has none. Says what it has.
        """
        name = row.get(self.id)
        if isinstance(name, int) and not isinstance(name, bool):
            name = str(name)
        if not isinstance(name, str) or not name:
            raise ConfigError(
                f"a document's {self.id} is {shown(name)}: use a string that is not empty, or a whole number."
            )
        text, chunks, passages = row.get(self.text), row.get(self.chunks), row.get("passages")
        if sum(value is not None for value in (text, chunks, passages)) != 1:
            given = "neither" if text is None and chunks is None else "both"
            raise ConfigError(
                f"document {shown(name)} has {given} of {shown(self.text)} and {shown(self.chunks)}: give exactly one."
            )
        if text is not None and not isinstance(text, str):
            raise ConfigError(f"document {shown(name)}: {self.text} is {shown(text)}: use a string.")
        for part in (chunks, passages):
            if part is not None and not (isinstance(part, list) and all(isinstance(one, str) for one in part)):
                raise ConfigError(f"document {shown(name)}: {self.chunks} is {shown(part)}: use a list of strings.")
        size = row.get("size")
        return SourceDocument(
            name,
            text,
            None if chunks is None else tuple(chunks),
            _bytes(text, chunks) if size is None else size,
            f"document {shown(name)}",
            None if passages is None else tuple(passages),
        )


def row_of(document: SourceDocument) -> dict[str, Any]:
    """A document as a row of `SCHEMA`."""
    return {
        "id": document.id,
        "text": document.text,
        "chunks": None if document.chunks is None else list(document.chunks),
        "passages": None if document.passages is None else list(document.passages),
        "size": document.size,
        "failed": None,
        "error": None,
    }


def tables(rows: Iterable[dict[str, Any]], schema: Any, most: int) -> Iterator[Any]:
    """Rows as tables of Arrow, each of about `most` bytes, so that what reads them need not wait for all.

    Args:
        rows: each with a `size`.
        schema: of the tables.
        most: bytes.
    """
    held: list[dict[str, Any]] = []
    size = 0
    for row in rows:
        held.append(row)
        size += row["size"]
        if size >= most:
            yield pyarrow.Table.from_pylist(held, schema=schema)
            held, size = [], 0
    if held:
        yield pyarrow.Table.from_pylist(held, schema=schema)


def _bytes(text: str | None, chunks: list[str] | None) -> int:
    return sum(len(part.encode("utf-8", "surrogatepass")) for part in ([text] if text is not None else chunks or []))
