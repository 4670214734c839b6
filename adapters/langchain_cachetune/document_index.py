"""A vector store and document index that updates the KV store together with another vector store."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.indexing import UpsertResponse
from langchain_core.indexing.base import DeleteResponse, DocumentIndex
from langchain_core.prompts import BasePromptTemplate
from langchain_core.vectorstores import InMemoryVectorStore, VectorStore
from pydantic import ConfigDict, Field, model_validator

from cachetune_rag import CacheTune, PrecomputeSummary
from cachetune_rag import Document as EngineDocument
from cachetune_rag.concurrency.async_calls import call_in_thread
from cachetune_rag.errors import ConfigError
from cachetune_store import ChunkKey, make_key
from langchain_cachetune import settings
from langchain_cachetune.searching import SearchesAnother
from langchain_cachetune.shown import Shown, content_id, stored_texts
from langchain_cachetune.sources import documents_of, shows_itself, some_of

_log = logging.getLogger(__name__)
_SAMPLE = 8


class CacheTuneIndex(DocumentIndex, SearchesAnother):
    """A vector store whose documents have their KV precomputed: `index(docs, records, CacheTuneIndex(...))`.

    The documents are in the vector store. This index stores their KV when they are added, and frees it when they are deleted. It can be
    used as a vector store (`as_retriever`, `ParentDocumentRetriever(vectorstore=...)`), as a document index, or as a retriever, by
    similarity. For documents that were added to the vector store before, or directly, see `rebuild`.

    Args:
        engine: the engine.
        vectorstore: any vector store that can return documents by id (`get_by_ids`).
        document_prompt: how the chain shows a document. It only matters here if it changes a document's content.
        shown: returns the texts that prompts will show of a document, if these are not its content: for example a window or parent
            in its metadata, or an empty list for documents that are searched but never shown.
        k: how many documents a search returns.
        search_kwargs: further arguments of `similarity_search`.
    """

    engine: CacheTune = Field(exclude=True, repr=False)
    vectorstore: VectorStore
    document_prompt: BasePromptTemplate[str] | None = None
    shown: Shown | None = Field(default=None, exclude=True, repr=False)
    k: int = Field(default=4, gt=0)
    search_kwargs: dict[str, Any] = Field(default_factory=dict)

    model_config = ConfigDict(arbitrary_types_allowed=True)

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, values: Any) -> Any:
        if isinstance(values, Mapping):
            try:
                settings.refuse_unknown(values, cls.model_fields, "CacheTuneIndex")
            except ConfigError as error:
                raise ValueError(str(error)) from error  # as pydantic wants it
        return values

    @model_validator(mode="after")
    def _look_at_what_is_there(self) -> Self:
        """Log a warning if no KV is stored for the documents in the vector store.

        A record manager skips documents that it knows, so their KV would never be computed.
        """
        there = [document for document in some_of(self.vectorstore, _SAMPLE) if self._texts(document)]
        if there and not any(self.engine.store.contains(key) for document in there for key in self._keys(document)):
            _log.warning(
                "the vector store of a CacheTuneIndex holds documents whose KV isn't stored (none of the first %d is): call the "
                "index's rebuild() once to compute it. Until then requests compute them as they meet them",
                len(there),
            )
        return self

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        """A copy of the vector store, with the same engine, because models and KV stores can't be copied."""
        memo = {} if memo is None else memo
        memo[id(self.engine)] = self.engine
        return super().__deepcopy__(memo)

    @classmethod
    def from_texts(
        cls,
        texts: list[str],
        embedding: Embeddings,
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: list[str] | None = None,
        engine: CacheTune | None = None,
        vectorstore: VectorStore | None = None,
        **kwargs: Any,
    ) -> Self:
        """An index of these texts.

        Args:
            texts: the texts.
            embedding: for the vector store, if none is given.
            metadatas: one for each text.
            ids: one for each text.
            engine: the engine.
            vectorstore: where the texts are stored. Default: in memory.
            kwargs: further arguments of the class.
        """
        if engine is None:
            raise ConfigError("CacheTuneIndex.from_texts needs engine=, the engine that computes the texts' KV.")
        store = InMemoryVectorStore(embedding) if vectorstore is None else vectorstore
        index = cls(engine=engine, vectorstore=store, **kwargs)
        index.add_texts(texts, metadatas, ids=ids)
        return index

    # -- adding ---------------------------------------------------------------------------------------------------

    def upsert(self, items: Sequence[Document], /, **kwargs: Any) -> UpsertResponse:
        """Add or replace documents and precompute their KV. Documents without an id are given one.

        The KV is stored first, so that no document can be retrieved if that fails. KV that is stored already isn't computed again.
        """
        latest = _identified(items)
        self._precompute(latest.values(), self.shown)
        if known := self._known(list(latest)):
            self.vectorstore.delete(known)  # not every store replaces on its own
        self.vectorstore.add_documents(list(latest.values()), ids=list(latest), **kwargs)
        return UpsertResponse(succeeded=list(latest), failed=[])

    async def aupsert(self, items: Sequence[Document], /, **kwargs: Any) -> UpsertResponse:
        """The same, the KV on a thread of its own and the rest as the vector store does it."""
        latest = _identified(items)
        await call_in_thread(self._precompute, latest.values(), self.shown)
        if known := await self._aknown(list(latest)):
            await self.vectorstore.adelete(known)
        await self.vectorstore.aadd_documents(list(latest.values()), ids=list(latest), **kwargs)
        return UpsertResponse(succeeded=list(latest), failed=[])

    def add_documents(self, documents: list[Document], **kwargs: Any) -> list[str]:
        """Add or replace documents and precompute their KV; returns their ids."""
        named = _named(documents, kwargs.pop("ids", None))
        self.upsert(named, **kwargs)
        return [str(document.id) for document in named]

    async def aadd_documents(self, documents: list[Document], **kwargs: Any) -> list[str]:
        """Add or replace documents and precompute their KV; returns their ids."""
        named = _named(documents, kwargs.pop("ids", None))
        await self.aupsert(named, **kwargs)
        return [str(document.id) for document in named]

    def add_texts(
        self,
        texts: Iterable[str],
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: list[str] | None = None,
        **kwargs: Any,
    ) -> list[str]:
        """Add or replace texts as documents and precompute their KV; returns their ids."""
        return self.add_documents(_documents(texts, metadatas), ids=ids, **kwargs)

    async def aadd_texts(
        self,
        texts: Iterable[str],
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: list[str] | None = None,
        **kwargs: Any,
    ) -> list[str]:
        """Add or replace texts as documents and precompute their KV; returns their ids."""
        return await self.aadd_documents(_documents(texts, metadatas), ids=ids, **kwargs)

    def rebuild(self, source: Any = None, *, ids: Iterable[str] | None = None) -> PrecomputeSummary:
        """Compute the missing KV of documents that were not added through this index. The vector store is not changed.

        Args:
            source: the vector store (default: this index's), a retriever (for the documents that it returns, such as the parents of a
                `ParentDocumentRetriever`), a docstore, or documents. `shown` is used for all except those of a docstore.
            ids: ids of the vector store's documents, if it can't list them: `ids=record_manager.list_keys()`.

        Raises:
            ConfigError: the source can't list its documents.
        """
        shown = None if shows_itself(source) else self.shown
        return self._precompute(documents_of(self.vectorstore if source is None else source, ids), shown)

    # -- deleting -------------------------------------------------------------------------------------------------

    # A vector store returns bool | None, and a document index DeleteResponse. A DeleteResponse counts as True, which means success.
    def delete(self, ids: list[str] | None = None, **kwargs: Any) -> DeleteResponse:  # type: ignore[override]
        """Delete documents, and free the KV that no other document holds. Unknown ids are ignored.

        This includes KV that was stored after requests that missed it.
        """
        found = self.vectorstore.get_by_ids(_given(ids))
        known = [str(document.id) for document in found]
        if known:
            self.vectorstore.delete(known, **kwargs)
        self._forget(found, _given(ids))
        return DeleteResponse(succeeded=known, num_deleted=len(known), failed=[], num_failed=0)

    async def adelete(self, ids: list[str] | None = None, **kwargs: Any) -> DeleteResponse:  # type: ignore[override]
        """The same, the KV on a thread of its own and the rest as the vector store does it."""
        found = await self.vectorstore.aget_by_ids(_given(ids))
        known = [str(document.id) for document in found]
        if known:
            await self.vectorstore.adelete(known, **kwargs)
        await call_in_thread(self._forget, found, _given(ids))
        return DeleteResponse(succeeded=known, num_deleted=len(known), failed=[], num_failed=0)

    # -- reading --------------------------------------------------------------------------------------------------

    def get(self, ids: Sequence[str], /, **kwargs: Any) -> list[Document]:
        """The documents with these ids. Unknown ids are skipped."""
        return self.vectorstore.get_by_ids(list(ids))

    async def aget(self, ids: Sequence[str], /, **kwargs: Any) -> list[Document]:
        """The documents with these ids. Unknown ids are skipped."""
        return await self.vectorstore.aget_by_ids(list(ids))

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, **kwargs: Any
    ) -> list[Document]:
        return self.vectorstore.similarity_search(query, **{"k": self.k, **self.search_kwargs, **kwargs})

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun, **kwargs: Any
    ) -> list[Document]:
        return await self.vectorstore.asimilarity_search(query, **{"k": self.k, **self.search_kwargs, **kwargs})

    # -- inside ---------------------------------------------------------------------------------------------------

    def _texts(self, document: Document) -> list[str]:
        return stored_texts(document, self.document_prompt, self.shown)

    def _keys(self, document: Document) -> list[ChunkKey]:
        namespace = self.engine.namespace
        return [make_key(namespace, self.engine.prompts.encode(text)) for text in self._texts(document)]

    def _precompute(self, documents: Iterable[Document], shown: Shown | None) -> PrecomputeSummary:
        return self.engine.precompute(
            EngineDocument(
                content_id(document.page_content) if document.id is None else document.id,
                stored_texts(document, self.document_prompt, shown),
            )
            for document in documents
        )

    def _forget(self, found: Sequence[Document], ids: Sequence[str]) -> None:
        """Free documents' KV, whether it was stored under their ids, or after requests that didn't know their ids."""
        names = dict.fromkeys(ids)
        store, tenant = self.engine.store, self.engine.namespace.tenant
        if found:
            self.engine.flush()  # so that chunks that still wait to be stored are found as well
        for document in found:
            if stored := [key for key in self._keys(document) if store.contains(key)]:
                store.extend_document(str(document.id), stored, tenant=tenant)
            names[content_id(document.page_content)] = None
        for id in names:
            self.engine.remove(id, missing_ok=True)

    def _known(self, ids: Sequence[str]) -> list[str]:
        return [str(document.id) for document in self.vectorstore.get_by_ids(list(dict.fromkeys(ids)))]

    async def _aknown(self, ids: Sequence[str]) -> list[str]:
        return [str(document.id) for document in await self.vectorstore.aget_by_ids(list(dict.fromkeys(ids)))]


def _given(ids: list[str] | None) -> list[str]:
    if ids is None:
        raise ValueError("delete() needs ids: a list of document ids.")  # LangChain asks for a ValueError here
    return list(dict.fromkeys(ids))


def _identified(items: Iterable[Document]) -> dict[str, Document]:
    """Documents by id. Of several with one id the last counts. Documents without an id get one."""
    documents = [item if item.id is not None else _with_id(item, str(uuid.uuid4())) for item in items]
    return {str(document.id): document for document in documents}


def _named(documents: Sequence[Document], ids: Sequence[str | None] | None) -> list[Document]:
    if ids is not None and len(ids) != len(documents):
        raise ConfigError(f"there are {len(documents)} documents and {len(ids)} ids: give one a document.")
    given = [document.id for document in documents] if ids is None else ids
    return [
        _with_id(document, str(uuid.uuid4()) if id is None else id)
        for document, id in zip(documents, given, strict=True)
    ]


def _documents(texts: Iterable[str], metadatas: Sequence[dict[str, Any]] | None) -> list[Document]:
    listed = list(texts)
    if metadatas is not None and len(metadatas) != len(listed):
        raise ConfigError(f"there are {len(listed)} texts and {len(metadatas)} metadatas: give one a text.")
    return [
        Document(page_content=text, metadata=dict(metadata))
        for text, metadata in zip(listed, metadatas or [{}] * len(listed), strict=True)
    ]


def _with_id(document: Document, id: str) -> Document:
    return document if document.id == id else document.model_copy(update={"id": id})
