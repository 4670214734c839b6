"""Documents cut into chunks, in rows of about the same number of tokens. Each such row is computed by one actor, and is what is done again where one dies."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import pyarrow

from cachetune_rag.model.loading import load_tokenizer
from cachetune_rag.text.documents import Document
from cachetune_rag.text.splitting import Splitter
from cachetune_rag.text.tokenizer import ContentTokenizer
from cachetune_ray import failures
from cachetune_ray.documents import Columns, tables

WORK_TOKENS = 32768
"""Tokens of a row. Less would be handed out more often, more would be lost with a worker."""

SCHEMA = pyarrow.schema(
    [
        (
            "documents",
            pyarrow.list_(pyarrow.struct([("id", pyarrow.string()), ("chunks", pyarrow.list_(pyarrow.string()))])),
        ),
        ("size", pyarrow.int64()),
        ("empty", pyarrow.list_(pyarrow.string())),
        ("failed", pyarrow.list_(pyarrow.struct([("id", pyarrow.string()), ("why", pyarrow.string())]))),
        ("error", failures.TYPE),
    ]
)


@dataclass
class Work:
    """What one actor computes at once.

    Attributes:
        documents: each an id and its chunks.
        size: bytes that they take in their files, with those of what is left out.
        empty: ids of documents without text.
        failed: files that can't be read, and why.
        tokens: of all chunks.
    """

    documents: list[dict[str, Any]] = field(default_factory=list)
    size: int = 0
    empty: list[str] = field(default_factory=list)
    failed: list[dict[str, str]] = field(default_factory=list)
    tokens: int = 0

    def as_row(self) -> dict[str, Any]:
        """As a row of `SCHEMA`."""
        return {"documents": self.documents, "size": self.size, "empty": self.empty, "failed": self.failed}


@dataclass(frozen=True)
class Cutter:
    """Cuts documents into chunks and puts them together in rows.

    Attributes:
        model, gguf_file, revision: whose tokenizer cuts.
        chunk_tokens: most tokens of a chunk.
        work_tokens: tokens of a row. A document with more is a row of its own.
        columns: which columns have the documents.
    """

    model: str
    gguf_file: str | None
    revision: str | None
    chunk_tokens: int
    work_tokens: int
    columns: Columns

    def __call__(self, table: Any) -> Iterator[Any]:
        """Rows of work for a table of documents. The last one has the error, if there is one."""
        try:
            for row in self.rows(table.to_pylist()):
                yield from tables([row], SCHEMA, 0)
        except failures.OURS as error:
            yield from tables([{**Work().as_row(), "error": failures.told(error)}], SCHEMA, 0)

    def cut(self, rows: Iterable[Mapping[str, Any]]) -> Iterator[Document]:
        """The documents in rows, in chunks, without those that are empty."""
        splitter = self._splitter()
        for row in rows:
            failures.check(row)
            if row.get("failed") is None:
                source = self.columns.document(row)
                if not source.empty:
                    yield Document(source.id, source.cut(splitter.split))

    def rows(self, rows: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        """The same in rows of work, with what was left out."""
        splitter, content = self._splitter(), _content(self.model, self.gguf_file, self.revision)
        work = Work()
        for row in rows:
            failures.check(row)
            if row.get("failed") is not None:
                work.failed.append({"id": row["id"], "why": row["failed"]})
                work.size += row["size"]
                continue
            source = self.columns.document(row)
            if source.empty:
                work.empty.append(source.id)
                work.size += source.size
                continue
            chunks = source.cut(splitter.split)
            tokens = sum(map(len, content.encode_many(chunks)))
            if work.documents and work.tokens + tokens > self.work_tokens:
                yield work.as_row()
                work = Work()
            work.documents.append({"id": source.id, "chunks": chunks})
            work.tokens += tokens
            work.size += source.size
        if work != Work():
            yield work.as_row()

    def _splitter(self) -> Splitter:
        content = _content(self.model, self.gguf_file, self.revision)
        return Splitter(lambda text: len(content.encode(text)), self.chunk_tokens)


@lru_cache(maxsize=2)
def _content(model: str, gguf_file: str | None, revision: str | None) -> ContentTokenizer:
    """The tokenizer, loaded once for all tasks that a process runs."""
    return ContentTokenizer(load_tokenizer(model, revision, gguf_file=gguf_file))
