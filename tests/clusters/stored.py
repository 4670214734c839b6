"""What precompute stored, to compare a cluster's store with that of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cachetune_rag import CacheTune, Document
from cachetune_rag.text.splitting import Splitter

ROWS = [
    {"id": f"d{i}", "text": "".join(f"Sentence {j} of document {i} is not in any other. " for j in range(5 + i))}
    for i in range(14)
]
CUT = {"chunk_tokens": 120, "work_tokens": 500}


def contents(model: Path, store: Path | str, **options: Any) -> dict[str, tuple[Any, ...]]:
    """The keys of each document's chunks, all of which are stored. Keys say what a chunk was computed with."""
    with CacheTune.from_pretrained(model, store, **options) as engine:
        documents = engine.documents()
        for document in documents:
            assert all(engine.store.contains(key, lasting=True) for key in document.chunks)
        return {document.id: tuple(document.chunks) for document in documents}


def by_one_process(model: Path, store: Path, rows: list[dict[str, str]] = ROWS) -> dict[str, tuple[Any, ...]]:
    with CacheTune.from_pretrained(model, store) as engine:
        splitter = Splitter(lambda text: len(engine.prompts.encode(text)), CUT["chunk_tokens"])
        engine.precompute([Document(row["id"], splitter.split(row["text"])) for row in rows])
    return contents(model, store)


def rows_of(model: Path, store: Path) -> dict[Any, bytes]:
    """The stored bytes of every chunk."""
    return {file.name: file.read_bytes() for file in sorted((store / "chunks").rglob("*")) if file.is_file()}
