"""Finds stored passages for a question, for commands, which have no retriever of the user."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cachetune_rag.checking.escaping import visible_line
from cachetune_rag.cli.console import UsageError, note, number
from cachetune_rag.cli.lexical import rank
from cachetune_rag.cli.options import DEFAULT_TOP_K
from cachetune_rag.cli.session import mismatch, same_but_lead_ins
from cachetune_rag.text.files.corpus import read_passage

if TYPE_CHECKING:
    from cachetune_rag.engine import CacheTune
    from cachetune_store import ChunkKey, ChunkStore


@dataclass(frozen=True)
class Passage:
    """A chunk of the prompt: its text, and where it comes from."""

    text: str
    source: str
    key: str | None


@dataclass(frozen=True)
class Wanted:
    """The passages that the options of a command ask for.

    Attributes:
        documents: ids of documents, each once.
        files: passages that were given as files.
        best: see `retrieve`.
    """

    documents: list[str]
    files: list[Passage]
    best: int | None

    @classmethod
    def of(
        cls, question: str, document: Sequence[str] | None, chunk_file: Sequence[str] | None, top_k: int | None
    ) -> Wanted:
        """What --document, --chunk-file and --top-k ask for; the files are read.

        Raises:
            UsageError: the question is empty, or a file can't be read.
        """
        if not question.strip():
            raise UsageError("the question is empty: ask something.")
        files = [Passage(read_passage(name), name, None) for name in chunk_file or ()]
        documents = list(dict.fromkeys(document or ()))
        return cls(documents, files, top_k if top_k is not None or documents or files else DEFAULT_TOP_K)

    def find(self, engine: CacheTune, store: ChunkStore, question: str) -> list[Passage]:
        """The passages, which are also named on stderr; errors as for `retrieve`."""
        passages = [*retrieve(engine, store, question, self.documents, self.best), *self.files]
        note(f"Using {number(len(passages), 'passage')}: {', '.join(visible_line(p.source) for p in passages)}")
        return passages


def retrieve(
    engine: CacheTune, store: ChunkStore, question: str, documents: list[str], top_k: int | None
) -> list[Passage]:
    """Passages from the store: all of the named documents, or the best `top_k` of these (or of all documents, if none is named).

    Raises:
        UsageError: no passage shares a word with the question, or one is no longer stored, or is of another model.
    """
    if not documents and top_k is None:
        return []
    known = {info.id: info.chunks for info in store.documents(tenant=engine.namespace.tenant)}
    sources: dict[ChunkKey, str] = {}
    for name in documents or known:
        for number_, key in enumerate(known[name], start=1):
            sources.setdefault(key, f"{name}#{number_}")
    if top_k is None:
        return [_passage(engine, store, key, sources[key]) for name in documents for key in known[name]]
    texts = ((key, text) for key, text in _texts(engine, store) if key in sources or not documents)
    best = rank(question, texts)[:top_k]
    if not best:
        where = "the named documents" if documents else f"the store {visible_line(store.path)}"
        raise UsageError(
            f"no passage in {where} shares a word with the question: reword it, or name documents with --document."
        )
    return [_passage(engine, store, key, sources.get(key, "earlier question")) for key in best]


def _texts(engine: CacheTune, store: ChunkStore) -> Iterator[tuple[ChunkKey, str]]:
    """The engine's texts, each once. A text may be stored twice: from before the lead-ins were chosen, and from after."""
    now, *before = engine.lead_ins.namespaces
    seen: set[bytes] = set()
    for namespace in (now, *before):
        for key, text, _ in store.texts(namespace=namespace):
            if before:
                digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
                if digest in seen:
                    continue
                seen.add(digest)
            yield key, text


def _passage(engine: CacheTune, store: ChunkStore, key: ChunkKey, source: str) -> Passage:
    reader = store.open(key)
    if reader is None or reader.text is None:
        raise UsageError(
            f"{visible_line(source)} is no longer in the store (the disk budget ran out, or its file was damaged): precompute its "
            "document again."
        )
    with reader:
        if not same_but_lead_ins(reader.head.namespace, engine.namespace):
            raise UsageError(mismatch(reader.head.namespace, engine.namespace, store.path))
        return Passage(reader.text, source, str(key))
