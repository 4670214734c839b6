"""Lists all documents of a vector store, a retriever or a docstore."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_core.stores import BaseStore
from langchain_core.vectorstores import VectorStore

from cachetune_rag.errors import ConfigError
from cachetune_store.printing import shown

_BATCH = 256


def documents_of(source: Any, ids: Iterable[str] | None = None) -> Iterator[Document]:
    """The documents of a source, one after another. Those of a docstore get their key as id.

    Args:
        source: a vector store, a retriever, a docstore, or documents.
        ids: ids of a vector store's documents, which are needed if it can't list them.

    Raises:
        ConfigError: the source can't list its documents.
    """
    if ids is not None:
        return _by_id(source, iter(ids))
    if isinstance(source, VectorStore):
        return _of_vector_store(source)
    if isinstance(source, BaseStore):
        return _of_docstore(source)
    if isinstance(source, BaseRetriever):
        return _of_retriever(source)
    if isinstance(source, Iterable) and not isinstance(source, str | Mapping):
        return _checked(source)
    raise ConfigError(
        f"source is {shown(source)}, a {type(source).__name__}: use a vector store, a retriever, a docstore or documents."
    )


def some_of(store: VectorStore, count: int) -> list[Document]:
    """A few documents of a vector store; none if it can't list their ids without reading all documents."""
    held, numbered = getattr(store, "store", None), getattr(store, "index_to_docstore_id", None)
    ids = list(held) if isinstance(held, dict) else list(numbered.values()) if isinstance(numbered, dict) else []
    try:
        return store.get_by_ids(ids[:count]) if ids else []
    except NotImplementedError:
        return []


def shows_itself(source: Any) -> bool:
    """Whether a source holds the texts that prompts show, rather than those that are searched: a docstore, or a retriever with one."""
    return isinstance(source, BaseStore) or isinstance(getattr(source, "docstore", None), BaseStore)


def _checked(documents: Iterable[Any]) -> Iterator[Document]:
    for i, document in enumerate(documents):
        if not isinstance(document, Document):
            raise ConfigError(f"item {i} of source is {shown(document)}: use langchain_core.documents.Document.")
        yield document


def _by_id(source: Any, ids: Iterator[str]) -> Iterator[Document]:
    store = getattr(source, "vectorstore", source)
    if not isinstance(store, VectorStore):
        raise ConfigError(f"ids name documents of a vector store; {type(source).__name__} is none and has none.")
    while batch := list(islice(ids, _BATCH)):
        yield from store.get_by_ids(batch)


def _of_vector_store(store: VectorStore) -> Iterator[Document]:
    """LangChain has no way to list a vector store, so this uses the public ways of the most common ones."""
    inner = getattr(store, "vectorstore", None)
    if isinstance(inner, VectorStore):  # one that wraps another
        yield from _of_vector_store(inner)
        return
    held = getattr(store, "store", None)
    numbered = getattr(store, "index_to_docstore_id", None)
    listing = getattr(store, "get", None)
    if isinstance(held, dict):  # InMemoryVectorStore
        yield from _by_id(store, iter(list(held)))
    elif isinstance(numbered, dict):  # FAISS
        yield from _by_id(store, iter(list(numbered.values())))
    elif callable(listing) and isinstance(found := _listed(listing), Mapping):  # Chroma
        metadatas: Sequence[Any] = found.get("metadatas") or [None] * len(found["ids"])
        for id, text, metadata in zip(found["ids"], found["documents"], metadatas, strict=True):
            yield Document(id=id, page_content=text or "", metadata=metadata or {})
    else:
        raise ConfigError(
            f"{type(store).__name__} has no way to list its documents that is known here: give ids= (a record manager's "
            "list_keys() has them, for one), or the documents themselves."
        )


def _listed(listing: Any) -> Any:
    try:
        found = listing()
    except TypeError:  # it needs ids, so it can't list all documents
        return None
    return found if isinstance(found, Mapping) and {"ids", "documents"} <= set(found) else None


def _of_docstore(store: BaseStore[str, Any]) -> Iterator[Document]:
    keys = store.yield_keys()
    while batch := list(islice(keys, _BATCH)):
        for key, document in zip(batch, store.mget(batch), strict=True):
            if isinstance(document, Document):
                yield document if document.id is not None else document.model_copy(update={"id": key})
            elif document is not None:
                raise ConfigError(
                    f"the docstore's {shown(key)} is a {type(document).__name__}, no Document: give a store of documents "
                    "(langchain's create_kv_docstore makes one of bytes)."
                )


def _of_retriever(retriever: BaseRetriever) -> Iterator[Document]:
    """The documents that a retriever returns. These are the parents if it searches for pieces of them."""
    for name in ("docstore", "vectorstore", "base_retriever", "retriever", "docs"):
        inner = getattr(retriever, name, None)
        if isinstance(inner, BaseStore | VectorStore | BaseRetriever | list):
            yield from documents_of(inner)
            return
    parts = getattr(retriever, "retrievers", None)
    if isinstance(parts, list | tuple):
        for part in parts:
            yield from documents_of(part)
        return
    raise ConfigError(
        f"{type(retriever).__name__} doesn't say where its documents are: give its vector store, its docstore or the "
        "documents themselves."
    )
